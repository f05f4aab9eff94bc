"""What happened in the last step as part of the observation: previous action, previous reward, episode start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

MEMORY_INPUTS = ("action", "reward", "start")
# The names of the inputs in the observation, and that of an observation which is no Dict itself.
KEYS = {"action": "previous_action", "reward": "previous_reward", "start": "episode_start"}
OBSERVATION = "observation"


class MemoryInputs(gym.Wrapper[dict[str, Any], Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Adds to every observation what the agent did and was paid in the step before.

    The observation becomes a Dict: the entries of a Dict as they are, anything else as "observation", and

    - "previous_action" (float32 [n]): the action that the environment was given. Discrete and MultiDiscrete actions are
      one-hot, bits are 0 and 1, Box actions flat and in their own units.
    - "previous_reward" (float32 [1]): the reward as the environment pays it. A `VecNormalize` outside of this wrapper
      does not touch it with `norm_reward`, and treats it as it treats other observations with `norm_obs`.
    - "episode_start" (float32 [1]): 1 in the first observation of an episode, else 0.

    In the first observation of an episode previous action and reward are zeros; a one-hot action is never all zeros, a
    reward may be, so use "start" where that matters.
    """

    def __init__(self, env: gym.Env[Any, Any], inputs: Sequence[str] = MEMORY_INPUTS) -> None:
        """Wrap `env`.

        Args:
            env: Environment with any action space that gymnasium can flatten.
            inputs: Any of "action", "reward" and "start".

        Raises:
            ValueError: `inputs` is empty or names another, or the observation has an entry of that name already.
        """
        gym.utils.RecordConstructorArgs.__init__(self, inputs=inputs)
        super().__init__(env)
        unknown = [name for name in inputs if name not in MEMORY_INPUTS]
        if unknown or not inputs or isinstance(inputs, str):
            raise ValueError(f"inputs={inputs!r} must be a list of some of {', '.join(map(repr, MEMORY_INPUTS))}")
        self._inputs = [name for name in MEMORY_INPUTS if name in inputs]
        space = env.observation_space
        self._is_dict = isinstance(space, spaces.Dict)
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {OBSERVATION: space}
        taken = [KEYS[name] for name in self._inputs if KEYS[name] in parts]
        if taken:
            raise ValueError(f"the observation has an entry {taken[0]!r} already: rename it, or leave that input out")
        self._action = _flat_box(env.action_space) if "action" in inputs else spaces.Box(0, 1, (0,))
        added = {
            "action": self._action,
            "reward": spaces.Box(-np.inf, np.inf, (1,), np.float32),
            "start": spaces.Box(0, 1, (1,), np.float32),
        }
        self.observation_space = spaces.Dict(parts | {KEYS[name]: added[name] for name in self._inputs})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: previous action and reward are zeros, the start flag is 1."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._join(obs, np.zeros(self._action.shape, np.float32), 0.0, 1.0), info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Take a step and note it in the observation that it leads to."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        flat: NDArray[np.float32] = np.empty(0, np.float32)
        if "action" in self._inputs:
            flat = np.asarray(spaces.flatten(self.env.action_space, action), np.float32)
        return self._join(obs, flat, float(reward), 0.0), reward, terminated, truncated, info

    def _join(self, obs: Any, action: NDArray[np.float32], reward: float, start: float) -> dict[str, Any]:
        values = {"action": action, "reward": np.array([reward], np.float32), "start": np.array([start], np.float32)}
        added = {KEYS[name]: values[name] for name in self._inputs}
        return {**obs, **added} if self._is_dict else {OBSERVATION: obs, **added}


def _flat_box(space: spaces.Space[Any]) -> spaces.Box:
    """The flattened space in float32, widened to 0, which stands for no action."""
    flat = spaces.flatten_space(space)
    if not isinstance(flat, spaces.Box):
        raise ValueError(f"the previous action of {space} has no fixed size: leave 'action' out of inputs")
    low, high = (np.asarray(bound, np.float32) for bound in (flat.low, flat.high))
    return spaces.Box(np.minimum(low, 0), np.maximum(high, 0), dtype=np.float32)
