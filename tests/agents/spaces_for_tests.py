"""Small environments over every kind of observation and action space."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "image": IMAGE,
    "discrete": spaces.Discrete(4),
    "discrete, not from 0": spaces.Discrete(4, start=-2),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-discrete, not from 0": spaces.MultiDiscrete([3, 2], start=[5, -1]),
    "multi-binary": spaces.MultiBinary(3),
    "whole numbers": spaces.Box(-3, 3, (3,), np.int64),
    "dict": spaces.Dict({"vector": spaces.Box(-1, 1, (3,), np.float32), "flag": spaces.Discrete(2)}),
    "dict, not from 0": spaces.Dict(
        {"number": spaces.Discrete(3, start=7), "pair": spaces.MultiDiscrete([2, 2], start=[1, 2])}
    ),
    "dict with image": spaces.Dict({"vector": spaces.Box(-1, 1, (3,), np.float32), "image": IMAGE}),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(3),
}


class RandomEpisodes(gym.Env[Any, Any]):
    """Random observations and rewards; episodes of random length end by termination or by a time limit."""

    def __init__(self, observation: str = "vector", action: str = "discrete", longest: int = 12) -> None:
        self.observation_space = OBSERVATIONS[observation]
        self.action_space = ACTIONS[action]
        self.longest = longest

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.left = int(self.np_random.integers(1, self.longest + 1))
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        self.left -= 1
        over = self.left == 0
        cut = bool(over and self.np_random.random() < 0.5)
        return self.observation_space.sample(), float(self.np_random.normal()), over and not cut, cut, {}


def vec_env(n_envs: int = 3, seed: int = 0, **kwargs: Any) -> VecEnv:
    """Parallel copies of `RandomEpisodes`."""
    return make_vec_env(RandomEpisodes, n_envs=n_envs, seed=seed, env_kwargs=kwargs)


def policy_name(observation: str, memory: str = "XLSTM") -> str:
    """The policy alias for a kind of observation."""
    kind = "MultiInput" if "dict" in observation else "Cnn" if observation == "image" else "Mlp"
    return f"{kind}{memory}Policy"
