"""Several episodes that an agent takes for one."""

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from xlstm_rl.agents.nonfinite import SKIPPED

# What environments and monitors say about a single episode.
_OF_ONE_EPISODE = ("episode", "is_success")


class EpisodesInARow(VecEnvWrapper):
    """Ends an episode for the agent only when `count` episodes of the environment are over.

    The first observation of the next episode follows the last step of the one before, and a memory is carried on: only
    the observation, with memory inputs if the environments have them, says that a new one began.

    Args:
        venv: environments that reset themselves, as all of Stable-Baselines3 do.
        count: at least 1.

    Raises:
        ValueError: `count` is below 1.
    """

    def __init__(self, venv: VecEnv, count: int) -> None:
        super().__init__(venv)
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        self._count = count
        self._over = np.zeros(venv.num_envs, int)

    def reset(self) -> VecEnvObs:
        """Start all anew."""
        self._over[:] = 0
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """As the environments say, but for the ends of episodes."""
        obs, rewards, dones, infos = self.venv.step_wait()
        finished = dones & np.array([SKIPPED not in info for info in infos])
        self._over += finished
        ends = finished & (self._over == self._count)
        self._over[ends] = 0
        kept: list[dict[str, Any]] = [
            {key: value for key, value in info.items() if key not in _OF_ONE_EPISODE} for info in infos
        ]
        return obs, rewards, ends, kept
