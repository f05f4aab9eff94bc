"""Running normalisation statistics of SB3's VecNormalize as JSON, because its own files are pickles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

_SETTINGS = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")


def dump_normalizer(normalizer: VecNormalize) -> str:
    """Settings and statistics as JSON, every number exact."""
    settings = {name: getattr(normalizer, name) for name in _SETTINGS}
    return json.dumps({"settings": settings, "statistics": normalizer_statistics(normalizer)})


def load_normalizer(text: str, env: VecEnv) -> VecNormalize:
    """Wrap an environment with the settings and statistics that `dump_normalizer` wrote; nothing in it is run.

    Args:
        text: the JSON.
        env: with the observation space that was normalised.

    Raises:
        ValueError: the text is no such JSON, its shapes do not fit the environment, or numbers are not finite.
    """
    try:
        content = json.loads(text)
        settings, statistics = content["settings"], content["statistics"]
        normalizer = VecNormalize(env, **{name: settings[name] for name in _SETTINGS})
        restore_statistics(normalizer, statistics)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"these are no normalisation statistics: {error!r}; save them with dump_normalizer") from error
    return normalizer


@contextmanager
def statistics_kept(normalizer: VecNormalize | None) -> Iterator[None]:
    """The statistics stay as they are while episodes are played that are no training; None has none."""
    if normalizer is None:
        yield
        return
    training, normalizer.training = normalizer.training, False
    try:
        yield
    finally:
        normalizer.training = training


def normalizer_statistics(normalizer: VecNormalize) -> dict[str, Any]:
    """The running statistics as numbers and lists of them, every number exact."""
    statistics: dict[str, Any] = {"returns": _describe(normalizer.ret_rms)}
    if normalizer.norm_obs:
        rms = normalizer.obs_rms
        statistics["observations"] = (
            {key: _describe(part) for key, part in rms.items()} if isinstance(rms, dict) else _describe(rms)
        )
    return statistics


def restore_statistics(normalizer: VecNormalize, statistics: dict[str, Any]) -> None:
    """Take over what `normalizer_statistics` told.

    Raises:
        KeyError, TypeError: these are no statistics.
        ValueError: they are of another shape or not finite.
    """
    _restore(normalizer.ret_rms, statistics["returns"], "returns")
    if normalizer.norm_obs:
        rms = normalizer.obs_rms
        for key, part in (rms if isinstance(rms, dict) else {None: rms}).items():
            given = statistics["observations"]
            _restore(part, given if key is None else given[key], "observations" if key is None else key)


def _describe(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _restore(rms: RunningMeanStd, given: dict[str, Any], name: str) -> None:
    mean, var = np.array(given["mean"], np.float64), np.array(given["var"], np.float64)
    expected = np.shape(rms.mean)
    if mean.shape != expected or var.shape != expected:
        raise ValueError(f"statistics of {name} have shape {mean.shape}, the environment's are {expected}")
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise ValueError(f"statistics of {name} are not finite")
    rms.mean, rms.var, rms.count = mean, var, float(given["count"])
