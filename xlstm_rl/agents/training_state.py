"""What a training run is besides the agent: random numbers, running episodes, statistics of vector wrappers."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize

from xlstm_rl.agents.env_contract import calls_one_alone, has_method
from xlstm_rl.agents.observations import entries, map_obs

_NORMALIZER = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")


class TrainingPoint(NamedTuple):
    """A training run between two rollouts."""

    attributes: dict[str, Any]
    """Of the model, those that a rollout changes."""
    random: dict[str, Any]
    """States of the generators of Python, NumPy and torch."""
    wrappers: list[Any]
    """State of every vector wrapper, the outermost first."""


def mark_point(model: OnPolicyAlgorithm) -> TrainingPoint:
    """Note the present, which must lie between two rollouts; the environments keep theirs until the next mark."""
    env = env_of(model)
    if has_method(env, "mark_point"):
        env.env_method("mark_point")
    changing = ("num_timesteps", "ep_info_buffer", "ep_success_buffer")
    names = [name for name in vars(model) if name in changing or name.startswith("_last_")]
    # deep: acting writes memory states over those before
    attributes = {name: copy.deepcopy(vars(model)[name]) for name in names}
    return TrainingPoint(
        attributes, _random_state(model.device), [_wrapper_state(wrapper) for wrapper in _wrappers(env)]
    )


def read_training(env: VecEnv, point: TrainingPoint) -> dict[str, Any]:
    """The training run at a point as plain values; `restore_training` takes them."""
    episodes = env.env_method("resume_point") if has_method(env, "resume_point") else None
    return {"random": point.random, "wrappers": point.wrappers, "episodes": episodes}


def restore_training(env: VecEnv, state: Mapping[str, Any], device: torch.device) -> str | None:
    """Bring environments, wrappers and generators to where `read_training` found them.

    Returns:
        Why all environments must start new episodes; None if the running ones go on.

    Raises:
        KeyError, IndexError, RuntimeError, TypeError, ValueError: this is no such state, or not of such environments.
    """
    wrappers = list(_wrappers(env))
    if len(wrappers) != len(state["wrappers"]):
        raise ValueError(f"the run had {len(state['wrappers'])} vector wrappers, the environment has {len(wrappers)}")
    for wrapper, kept in zip(wrappers, state["wrappers"], strict=True):
        _set_wrapper_state(wrapper, kept)
    restarted = _resume_episodes(env, state["episodes"])
    # replaying episodes may draw random numbers, so these come last
    _set_random_state(state["random"], device)
    return restarted


def env_of(model: OnPolicyAlgorithm) -> VecEnv:
    """The environment of an agent.

    Raises:
        ValueError: it has none.
    """
    if model.env is None:
        raise ValueError("the agent has no environment: hand one to load, resume or set_env")
    return model.env


def _resume_episodes(env: VecEnv, points: Any) -> str | None:
    if points is None:
        return "their state was not noted (wrap each in xlstm_rl.envs.Resumable)"
    if not has_method(env, "resume_at") or not calls_one_alone(env):
        return "these environments cannot be brought back (wrap each in xlstm_rl.envs.Resumable)"
    for index, point in enumerate(points):
        if point is None:
            return (
                f"the episode of environment {index} was not kept: it was too long, its worker had been restarted, or "
                "its random generator cannot be read"
            )
        if env.env_method("resume_at", point, indices=index) != [True]:
            return f"environment {index} is not deterministic: its episode, played again, went another way or failed"
    return None


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, key, position, has_gauss, cached = np.random.get_state()
    # asking for it would start CUDA, which a run on the CPU has no use for
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(key).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, np.array(key, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)


def _wrappers(env: VecEnv) -> Iterator[VecEnvWrapper]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def _wrapper_state(wrapper: VecEnvWrapper) -> Any:
    """Arrays are copied, for wrappers change them in place."""
    if hasattr(type(wrapper), "get_state"):
        return copy.deepcopy(wrapper.get_state())
    if isinstance(wrapper, VecNormalize):
        # before the first reset there is no observation
        running = {
            "returns": wrapper.returns,
            "old_reward": wrapper.old_reward,
            "old_obs": vars(wrapper).get("old_obs"),
        }
        return normalizer_state(wrapper) | {"training": wrapper.training} | copy.deepcopy(running)
    if isinstance(wrapper, VecFrameStack):
        return copy.deepcopy(_stacks(wrapper))
    if isinstance(wrapper, VecMonitor):
        return {name: copy.copy(getattr(wrapper, name)) for name in ("episode_returns", "episode_lengths")}
    return {"unknown": copy.deepcopy(_plain_attributes(wrapper))}


def _set_wrapper_state(wrapper: VecEnvWrapper, state: Any) -> None:
    if hasattr(type(wrapper), "set_state"):
        wrapper.set_state(state)
    elif isinstance(wrapper, VecNormalize):
        # files of format 1 have no settings
        _set_normalizer(wrapper, {"settings": _settings(wrapper), **state})
        wrapper.training = _checked("training", state.get("training", wrapper.training), bool)
        for name in ("returns", "old_reward", "old_obs"):
            setattr(wrapper, name, state[name])
    elif isinstance(wrapper, VecFrameStack):
        for key, stack in _stacks(wrapper).items():
            stack[...] = state[key]
    elif isinstance(wrapper, VecMonitor):
        wrapper.episode_returns, wrapper.episode_lengths = state["episode_returns"], state["episode_lengths"]
    elif state is not None:
        _warn_of_changes(wrapper, state["unknown"])


def _plain_attributes(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """What a wrapper that nobody here knows keeps in plain attributes; other known ones keep nothing for long."""
    if type(wrapper).__module__.startswith(("stable_baselines3.", "xlstm_rl.")):
        return {}
    kinds = (bool, int, float, str, np.ndarray, np.number)
    given = {"num_envs", "render_mode", "class_attributes"}
    return {key: value for key, value in vars(wrapper).items() if isinstance(value, kinds) and key not in given}


def _warn_of_changes(wrapper: VecEnvWrapper, before: Mapping[str, Any]) -> None:
    now = _plain_attributes(wrapper)
    changed = [name for name, value in before.items() if name in now and not np.array_equal(value, now[name])]
    if changed:
        warnings.warn(
            f"{type(wrapper).__name__} starts anew with other values of {', '.join(changed)} than the run had, which "
            "may make it another run: give the wrapper get_state() and set_state(state), and they are kept",
            stacklevel=2,
        )


def _stacks(wrapper: VecFrameStack) -> dict[str, np.ndarray]:
    """The stacked frames by key; one key for observations that are no Dict."""
    stacked: Any = wrapper.stacked_obs
    inner = getattr(stacked, "sub_stacked_observations", None)
    parts = {"": stacked} if inner is None else inner
    return {key: part.stacked_obs for key, part in parts.items()}


def normalizer_state(normalizer: VecNormalize) -> dict[str, Any]:
    """Settings and running statistics as plain values, every number exact; `make_normalizer` takes them."""
    return {"settings": _settings(normalizer), "statistics": normalizer_statistics(normalizer)}


def make_normalizer(state: Any, env: VecEnv) -> VecNormalize:
    """Wrap an environment with the settings and statistics that `normalizer_state` told.

    Args:
        state: as told; nothing in it is run.
        env: with the observation space that was normalised.

    Raises:
        ValueError: this is no such state, its shapes do not fit the environment, or numbers are not finite.
    """
    try:
        settings = state["settings"]
        normalizer = VecNormalize(env, **{name: settings[name] for name in ("norm_obs", "norm_obs_keys", "clip_obs")})
        _set_normalizer(normalizer, state)
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are no normalisation statistics: {error!r}") from error
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
    statistics: dict[str, Any] = {"returns": _moments(normalizer.ret_rms)}
    if normalizer.norm_obs:
        statistics["observations"] = map_obs(_moments, normalizer.obs_rms)
    return statistics


def restore_statistics(normalizer: VecNormalize, statistics: dict[str, Any]) -> None:
    """Take over what `normalizer_statistics` told.

    Raises:
        KeyError, TypeError: these are no statistics.
        ValueError: they are of another shape or not finite.
    """
    _restore(normalizer.ret_rms, statistics["returns"], "returns")
    if normalizer.norm_obs:
        for key, part in entries(normalizer.obs_rms):
            given = statistics["observations"]
            _restore(part, given if key is None else given[key], "observations" if key is None else key)


def _settings(normalizer: VecNormalize) -> dict[str, Any]:
    return {name: getattr(normalizer, name) for name in _NORMALIZER}


def _set_normalizer(normalizer: VecNormalize, state: Mapping[str, Any]) -> None:
    settings = state["settings"]
    normalizer.norm_obs = _checked("norm_obs", settings["norm_obs"], bool)
    if normalizer.norm_obs and not hasattr(normalizer, "obs_rms"):
        raise ValueError("the run normalised observations, the VecNormalize given was made with norm_obs=False")
    normalizer.norm_reward = _checked("norm_reward", settings["norm_reward"], bool)
    for name in ("clip_obs", "clip_reward", "gamma", "epsilon"):
        value = _checked(name, settings[name], int | float)
        if not value >= 0:
            raise ValueError(f"{name}={value} of VecNormalize must not be negative")
        setattr(normalizer, name, value)
    if settings["norm_obs_keys"] != normalizer.norm_obs_keys:
        raise ValueError(
            f"the run normalised the keys {settings['norm_obs_keys']!r:.200}, the VecNormalize given normalises "
            f"{normalizer.norm_obs_keys}"
        )
    restore_statistics(normalizer, state["statistics"])


def _checked(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r:.100} of VecNormalize is no {kind}")
    return value


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _restore(rms: RunningMeanStd, given: dict[str, Any], name: str) -> None:
    mean, var = np.array(given["mean"], np.float64), np.array(given["var"], np.float64)
    count, expected = float(given["count"]), np.shape(rms.mean)
    if mean.shape != expected or var.shape != expected:
        raise ValueError(f"statistics of {name} have shape {mean.shape}, the environment's are {expected}")
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all() and 0 < count < np.inf):
        raise ValueError(f"statistics of {name} are not finite")
    rms.mean, rms.var, rms.count = mean, var, count
