"""What the vector wrappers around an environment do to its observations, as layers in front of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecMonitor, VecNormalize, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from torch import Tensor, nn

# The name of an observation that is no Dict.
SINGLE = ""


class Front(NamedTuple):
    """What lies between an environment and a policy."""

    space: spaces.Space[Any]
    """Of the observations that go in."""
    layers: dict[str, nn.Sequential]
    """By key of a Dict observation, or under `SINGLE`; from innermost to outermost wrapper."""
    outside: list[str]
    """Wrappers further in, which whoever runs the policy applies himself; innermost last."""


def without(front: Front, keys: Sequence[str]) -> Front:
    """The same without some keys of its Dict observations."""
    if not keys:
        return front
    kept = {key: layers for key, layers in front.layers.items() if key not in keys}
    return front._replace(space=spaces.Dict({key: front.space[key] for key in kept}), layers=kept)  # type: ignore[index]


class Normalize(nn.Module):
    """Observations in units of their running standard deviation, as `VecNormalize` does it.

    Args:
        statistics: of the observations.
        epsilon: added to the variance.
        clip: bound of the result.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: RunningMeanStd, epsilon: float, clip: float) -> None:
        super().__init__()
        self.clip = clip
        # in float64, as NumPy computes it: large means lose digits otherwise
        self.register_buffer("mean", torch.from_numpy(np.array(statistics.mean, np.float64)))
        self.register_buffer(
            "std", torch.from_numpy(np.asarray(np.sqrt(np.array(statistics.var, np.float64) + epsilon)))
        )

    def forward(self, obs: Tensor) -> Tensor:
        """[B, ...] -> float32 [B, ...]."""
        return ((obs.double() - self.mean) / self.std).clamp(-self.clip, self.clip).float()


class ChannelsFirst(nn.Module):
    """Images with channels last as `VecTransposeImage` turns them."""

    def forward(self, obs: Tensor) -> Tensor:
        """[B, height, width, channels] -> [B, channels, height, width]."""
        return obs.permute(0, 3, 1, 2)


def front_of(env: VecEnv | None, space: spaces.Space[Any]) -> Front:
    """Turn wrappers into layers, from the outermost inwards, as far as they are known.

    Args:
        env: as the agent sees it; None: there are no wrappers.
        space: of the policy's observations.
    """
    stages: dict[str, list[nn.Module]] = {key: [] for key in entries(space)}
    while isinstance(env, VecEnvWrapper) and isinstance(
        env, VecTransposeImage | VecNormalize | VecMonitor | VecCheckNan
    ):
        for key, layer in _layers_of(env).items():
            stages[key].insert(0, layer)
        env = env.venv
        space = env.observation_space
    outside = []
    while isinstance(env, VecEnvWrapper):
        if not isinstance(env, VecMonitor | VecCheckNan):
            outside.append(type(env).__name__)
        env = env.venv
    return Front(space, {key: nn.Sequential(*layers) for key, layers in stages.items()}, outside)


def as_seen(env: VecEnv | None, obs: Any) -> Any:
    """What the wrappers that `front_of` turns into layers make of observations [B, ...], or a dict of those."""
    if isinstance(env, VecTransposeImage):
        return env.transpose_observations(as_seen(env.venv, obs))
    if isinstance(env, VecNormalize):
        return env.normalize_obs(as_seen(env.venv, obs))
    return as_seen(env.venv, obs) if isinstance(env, VecMonitor | VecCheckNan) else obs


def entries(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """The spaces of a Dict by key, or the space itself under `SINGLE`."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {SINGLE: space}


def _layers_of(env: VecEnv) -> dict[str, nn.Module]:
    keys = list(entries(env.observation_space))
    if isinstance(env, VecTransposeImage) and not env.skip:
        images = env.image_space_keys if isinstance(env.observation_space, spaces.Dict) else keys
        return {key: ChannelsFirst() for key in images}
    if isinstance(env, VecNormalize) and env.norm_obs:
        rms = env.obs_rms if isinstance(env.obs_rms, dict) else {SINGLE: env.obs_rms}
        return {key: Normalize(part, env.epsilon, env.clip_obs) for key, part in rms.items()}
    return {}
