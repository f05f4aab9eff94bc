"""What happened in the last step as part of the observation: previous action, previous reward, episode start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from xlstm_rl.vec_envs.env_contract import reset_envs, vec_step

MEMORY_INPUTS = ("action", "reward", "start")
# The names of the inputs in the observation, and that of an observation which is no Dict itself.
KEYS = {"action": "previous_action", "reward": "previous_reward", "start": "episode_start"}
OBSERVATION = "observation"


class InputLayout:
    """How inputs go into an observation.

    Attributes:
        space: Dict of the observation and the inputs.
        action_size: Numbers that stand for an action; 0 if it is no input.
    """

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], inputs: Sequence[str]
    ) -> None:
        """Lay out.

        Args:
            observation_space: Of the environment.
            action_space: Any that gymnasium can flatten.
            inputs: Any of "action", "reward" and "start".

        Raises:
            ValueError: `inputs` is empty, names another or one twice, or the observation has an entry of that name
                already.
        """
        if isinstance(inputs, str) or not inputs or set(inputs) - set(MEMORY_INPUTS):
            raise ValueError(f"inputs={inputs!r} must be a list of some of {', '.join(map(repr, MEMORY_INPUTS))}")
        twice = [name for name in MEMORY_INPUTS if list(inputs).count(name) > 1]
        if twice:
            raise ValueError(f"inputs={list(inputs)} names {twice[0]!r} more than once: name each input once")
        self._inputs = [name for name in MEMORY_INPUTS if name in inputs]
        self._is_dict = isinstance(observation_space, spaces.Dict)
        parts = (
            dict(observation_space.spaces)
            if isinstance(observation_space, spaces.Dict)
            else {OBSERVATION: observation_space}
        )
        taken = [KEYS[name] for name in self._inputs if KEYS[name] in parts]
        if taken:
            raise ValueError(f"the observation has an entry {taken[0]!r} already: rename it, or leave that input out")
        self._action_space = action_space if "action" in inputs else spaces.Box(0, 1, (0,))
        action = _flat_box(self._action_space)
        self.action_size = action.shape[0]
        added = {
            "action": action,
            "reward": spaces.Box(-np.inf, np.inf, (1,), np.float32),
            "start": spaces.Box(0, 1, (1,), np.float32),
        }
        self.space = spaces.Dict(parts | {KEYS[name]: added[name] for name in self._inputs})

    def encode(self, action: Any) -> NDArray[np.float32]:
        """One action as float32 [action_size]."""
        if not self.action_size:
            return np.empty(0, np.float32)
        return np.asarray(spaces.flatten(self._action_space, action), np.float32)

    def join(self, obs: Any, action: Any, reward: Any, start: Any) -> dict[str, Any]:
        """An observation with its inputs.

        Args:
            obs: Of the environment, with any leading dimensions.
            action: [..., action_size].
            reward: [..., 1].
            start: [..., 1], 1 where an episode starts.
        """
        values = {"action": action, "reward": reward, "start": start}
        added = {KEYS[name]: np.asarray(values[name], np.float32) for name in self._inputs}
        return {**obs, **added} if self._is_dict else {OBSERVATION: obs, **added}


class MemoryInputs(gym.Wrapper[dict[str, Any], Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Adds the previous action, the previous reward and a start flag to every observation.

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
            ValueError: `inputs` is empty, names another or one twice, or the observation has an entry of that name
                already.
        """
        gym.utils.RecordConstructorArgs.__init__(self, inputs=inputs)
        super().__init__(env)
        self._layout = InputLayout(env.observation_space, env.action_space, inputs)
        self.observation_space = self._layout.space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: previous action and reward are zeros, the start flag is 1."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._layout.join(obs, np.zeros(self._layout.action_size), [0.0], [1.0]), info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Take a step and note it in the observation that it leads to."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        told = self._layout.join(obs, self._layout.encode(action), [reward], [0.0])
        return told, reward, terminated, truncated, info


class VecMemoryInputs(VecEnvWrapper):
    """What `xlstm_rl.MemoryInputs` does to one environment, for a vector environment.

    For simulators that step many copies at once, where a single one cannot be wrapped. The previous reward is that of
    `venv`: wrap before `VecNormalize`, so that it is the same in training and evaluation.

    Args:
        venv: the environments.
        inputs: any of "action", "reward" and "start".

    Raises:
        ValueError: `inputs` is empty, names another or one twice, or the observation has an entry of that name already.
    """

    def __init__(self, venv: VecEnv, inputs: Sequence[str] = MEMORY_INPUTS) -> None:
        self._layout = InputLayout(venv.observation_space, venv.action_space, inputs)
        super().__init__(venv, observation_space=self._layout.space)
        self._actions = np.zeros((venv.num_envs, 0))

    def reset(self) -> Any:
        """First observations: previous actions and rewards are zeros, the start flags are 1."""
        n = self.num_envs
        return self._layout.join(
            reset_envs(self.venv), np.zeros((n, self._layout.action_size)), np.zeros((n, 1)), np.ones((n, 1))
        )

    def step_async(self, actions: np.ndarray) -> None:
        """Hand the actions to the environments."""
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        """Observations with what led to them; a final observation with it too, the one after it as on `reset`."""
        obs, rewards, dones, infos = vec_step(self.venv, self.venv.step_wait(), "in a step")
        actions = np.stack([self._layout.encode(action) for action in self._actions])
        paid = np.array(rewards, np.float32)[:, None]
        for row in np.flatnonzero(dones):
            if "terminal_observation" in infos[row]:
                final = infos[row]["terminal_observation"]
                infos[row]["terminal_observation"] = self._layout.join(final, actions[row], paid[row], [0.0])
        start = dones[:, None]
        told = self._layout.join(obs, np.where(start, 0, actions), np.where(start, 0, paid), start)
        return told, rewards, dones, infos


def _flat_box(space: spaces.Space[Any]) -> spaces.Box:
    """The flattened space in float32, widened to 0, which stands for no action."""
    flat = spaces.flatten_space(space)
    if not isinstance(flat, spaces.Box):
        raise ValueError(f"the previous action of {space} has no fixed size: leave 'action' out of inputs")
    low, high = (np.asarray(bound, np.float32) for bound in (flat.low, flat.high))
    return spaces.Box(np.minimum(low, 0), np.maximum(high, 0), dtype=np.float32)
