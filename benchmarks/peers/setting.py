"""What is the same for all: tasks, sizes, and what is measured of a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

N_ENVS, N_STEPS, EPOCHS, BATCH = 16, 128, 4, 512
# The policies stay as they start, so that episodes have the same length for all.
LEARNING_RATE = 1e-7


class Contender(NamedTuple):
    """A library with its agent and its environments."""

    iterate: Callable[[], Any]
    """A rollout of N_ENVS x N_STEPS steps and its update."""
    error: Callable[[], float]
    """Largest difference of the log-probabilities that training computes, before its first step, to the rollout's."""


class LongEpisodes(gym.Env[np.ndarray, np.int64]):
    """Eight random numbers a step, episodes of 200 steps; the first one ends earlier, so that all are out of step."""

    observation_space = spaces.Box(-1, 1, (8,), np.float32)
    action_space = spaces.Discrete(4)
    first = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 201)) if self.first else 200
        self.first = False
        return self.np_random.random(8, dtype=np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self.np_random.random(8, dtype=np.float32), float(action == 0), self.left <= 0, False, {}


gym.register("LongEpisodes-v0", lambda **settings: LongEpisodes())
TASKS = {"cartpole": "CartPole-v1", "long": "LongEpisodes-v0"}


def vector_env(task: str) -> SyncVectorEnv:
    """gymnasium's own vector environment; episodes start again in the step that ends them."""
    return SyncVectorEnv([lambda: gym.make(TASKS[task])] * N_ENVS, autoreset_mode=AutoresetMode.SAME_STEP)


def head(width: int, outputs: int) -> nn.Sequential:
    """The network after the memory, the same everywhere."""
    return nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
