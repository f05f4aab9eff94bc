"""What environments answer, converted and checked once where it comes in, and what they may do without."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, unwrap_vec_normalize
from torch import Tensor

# What a vector environment does that lacks a method; RecursionError: a wrapper without its parent's attributes.
LACKING = (AttributeError, NotImplementedError, RecursionError)
# What one does that was never asked such a question.
_NO_ANSWER = (*LACKING, LookupError, TypeError, ValueError)


class FaultyEnvironmentError(RuntimeError):
    """An environment failed or answered what cannot be used; the message names it, the step and the cause.

    Attributes:
        index: of the environment; None where only a vector environment as a whole can be named.
    """

    def __init__(self, index: int | None, reason: str) -> None:
        super().__init__(f"{'the vector environment' if index is None else f'environment {index}'} {reason}")
        self.index = index


class VecStep(NamedTuple):
    """What a step of a vector environment led to."""

    observations: Any
    """[n_envs, ...], or a dict of those; tensors where the environment gives such."""
    rewards: np.ndarray
    """[n_envs], float."""
    dones: np.ndarray
    """bool [n_envs]"""
    infos: list[dict[str, Any]]
    """One for each environment."""


class EnvStep(NamedTuple):
    """What a step of one environment led to."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


# A vector environment.


def step_envs(env: VecEnv, actions: np.ndarray | Tensor, place: str) -> VecStep:
    """Step a vector environment and take its answer in the forms that Stable-Baselines3 accepts.

    Args:
        env: the environments.
        actions: [n_envs, ...], as the environment takes them; see `as_env_takes`.
        place: where this happens, for messages: "in step 3".

    Raises:
        FaultyEnvironmentError: the answer is another, or of another shape; names the environment and the step.
    """
    try:
        answer = env.step(actions)  # type: ignore[arg-type]
    except Exception as error:
        _say_where(error, place)
        raise
    return vec_step(env, answer, place)


def vec_step(env: VecEnv, answer: Any, place: str) -> VecStep:
    """What a step of a vector environment answered, checked; see `step_envs`."""
    if not isinstance(answer, tuple | list) or len(answer) != 4:
        raise FaultyEnvironmentError(
            None,
            f"answered {_told(answer)} {place}: a step of a vector environment of Stable-Baselines3 leads to "
            "observations, rewards, dones and infos; hand over one of gymnasium as it is",
        )
    obs, rewards, dones, infos = answer
    n_envs = env.num_envs
    checked = VecStep(
        checked_observations(env, obs, place),
        numbers_by_env(rewards, "rewards", n_envs, place),
        flags_by_env(dones, "dones", n_envs, place),
        _infos(infos, n_envs, place),
    )
    for row, info in enumerate(checked.infos):
        if info.get("terminal_observation") is not None:
            name, final = f"final observation {place}", info["terminal_observation"]
            info["terminal_observation"] = _observation(final, env.observation_space, name, row, tensors=True)
        if info.get("is_success") is not None:
            success = as_numbers(info["is_success"])
            if success is None or success.size != 1:
                raise FaultyEnvironmentError(
                    row, f"answered is_success {_told(info['is_success'])} {place}: must be true or false, or left out"
                )
    return checked


def episode_record(info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return "r" and length "l" of the episode that ended, as a `Monitor` notes them; None where nobody did.

    What else an environment calls "episode" in its infos is its own.
    """
    record = info.get("episode")
    return record if isinstance(record, Mapping) and {"r", "l"} <= record.keys() else None


def reset_envs(env: VecEnv) -> Any:
    """First observations [n_envs, ...], or a dict of those; raises as `step_envs`."""
    return checked_observations(env, env.reset(), "on reset")


def checked_observations(env: VecEnv, obs: Any, place: str) -> Any:
    """Observations [n_envs, ...], or a dict of those, of the environment's space; raises as `step_envs`.

    Tensors, as environments on a GPU give them, stay tensors where they are.
    """
    checked = _observation(obs, env.observation_space, f"observations {place}", None, (env.num_envs,), tensors=True)
    if isinstance(innermost(env), DummyVecEnv | SubprocVecEnv):
        return checked
    # others may write over them in their next step
    return map_obs(own_copy, checked)


def own_copy(part: Any) -> Any:
    """A copy as a tensor, where it is, of a tensor; as an array of anything else."""
    return part.clone() if isinstance(part, Tensor) else np.array(part)


def as_env_takes(actions: np.ndarray | Tensor, obs: Any) -> np.ndarray | Tensor:
    """Actions in the form of the observations that they answer: tensors on their device, or arrays."""
    first = next(part for _, part in entries(obs))
    if isinstance(first, Tensor):
        return torch.as_tensor(actions, device=first.device)
    return actions.numpy(force=True) if isinstance(actions, Tensor) else actions


def one_for_each(values: Any, n_envs: int, name: str) -> None:
    """Refuse what is given to environments one by one and is not as many.

    Raises:
        ValueError: there are more or fewer values than environments.
    """
    if len(values) != n_envs:
        raise ValueError(f"got {len(values)} {name} for {n_envs} environments: give one for each")


def rows_meant(indices: int | Iterable[int] | None, n_envs: int) -> list[int]:
    """Environments that an argument `indices` of Stable-Baselines3 means; negative numbers count from the end.

    Raises:
        IndexError: there is no such environment, or this is a mask, which would be taken for the numbers 0 and 1.
    """
    if indices is None:
        return list(range(n_envs))
    rows = [indices] if isinstance(indices, int | np.integer) else list(indices)
    for row in rows:
        if isinstance(row, bool | np.bool_) or not -n_envs <= row < n_envs:
            raise IndexError(
                f"there is no environment {row!r} of {n_envs}: give their numbers (of a mask, those of np.flatnonzero)"
            )
    return [int(row) % n_envs for row in rows]


class CountedVecEnv(VecEnv):
    """A vector environment whose options and `indices` must fit the number of its environments."""

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Options of the next reset: one dict for all environments, or one for each."""
        if isinstance(options, list | tuple):
            one_for_each(options, self.num_envs, "options")
        super().set_options(options)

    def _get_indices(self, indices: Any) -> list[int]:
        return rows_meant(indices, self.num_envs)


def numbers_by_env(values: Any, name: str, n_envs: int, place: str) -> np.ndarray:
    """Numbers as float [n_envs], in an array of their own; raises as `step_envs`."""
    array = as_numbers(values)
    if array is None or not (array.shape == (n_envs,) or (n_envs == 1 and array.ndim == 0)):
        raise FaultyEnvironmentError(None, f"answered {name} {_told(values)} {place}: one number for each of {n_envs}")
    own: np.ndarray = np.array(array, None if array.dtype.kind == "f" else np.float32).reshape(n_envs)
    return own


def flags_by_env(values: Any, name: str, n_envs: int, place: str) -> np.ndarray:
    """bool [n_envs] of booleans, or of numbers that are 0 or 1; raises as `step_envs`."""
    if isinstance(values, np.ndarray) and values.dtype == bool and values.shape == (n_envs,):
        # as nearly always
        return np.array(values)
    numbers = numbers_by_env(values, name, n_envs, place)
    odd = np.flatnonzero((numbers != 0) & (numbers != 1))
    if len(odd):
        raise FaultyEnvironmentError(int(odd[0]), f"answered {name} {numbers[odd[0]]} {place}: must be true or false")
    return np.asarray(numbers == 1)


def _infos(infos: Any, n_envs: int, place: str) -> list[dict[str, Any]]:
    if not isinstance(infos, Sequence) or len(infos) != n_envs:
        raise FaultyEnvironmentError(None, f"answered infos {_told(infos)} {place}: one dict for each of {n_envs}")
    if all(type(info) is dict for info in infos):
        # as nearly always
        return list(infos)
    return [_info(info, row, place) for row, info in enumerate(infos)]


def _say_where(error: Exception, place: str) -> None:
    """Add the place to an error that goes on as it is; Python 3.10 has no notes."""
    if sys.version_info >= (3, 11):
        error.add_note(f"{place}, while stepping the environments")


# One environment.


def env_step(answer: Any, space: spaces.Space[Any], index: int, place: str) -> EnvStep:
    """What `step` of one environment answered, checked.

    Args:
        answer: observation, reward, terminated, truncated and info.
        space: of the observation.
        index: of the environment.
        place: where this happens, for messages.

    Raises:
        FaultyEnvironmentError: it is another, or of another shape.
    """
    if not isinstance(answer, tuple | list) or len(answer) != 5:
        raise FaultyEnvironmentError(
            index,
            f"answered {_told(answer)} {place}: step() returns observation, reward, terminated, truncated and info",
        )
    obs, reward, terminated, truncated, info = answer
    number = as_numbers(reward)
    if number is None or number.size != 1:
        raise FaultyEnvironmentError(index, f"answered the reward {_told(reward)} {place}: it must be a number")
    flags = {"terminated": terminated, "truncated": truncated}
    for name, flag in flags.items():
        value = as_numbers(flag)
        if value is None or value.size != 1 or value.item() not in (0, 1):
            raise FaultyEnvironmentError(index, f"answered {name} {_told(flag)} {place}: must be true or false")
    return EnvStep(
        _observation(obs, space, f"observation {place}", index),
        float(number.item()),
        bool(as_numbers(terminated)),
        bool(as_numbers(truncated)),
        _info(info, index, place),
    )


def env_reset(answer: Any, space: spaces.Space[Any], index: int) -> tuple[Any, dict[str, Any]]:
    """What `reset` of one environment answered, checked; as for `env_step`."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise FaultyEnvironmentError(
            index, f"answered {_told(answer)} on reset: reset() returns an observation and an info"
        )
    obs, info = answer
    return _observation(obs, space, "observation on reset", index), _info(info, index, "on reset")


def _observation(
    obs: Any,
    space: spaces.Space[Any],
    name: str,
    index: int | None,
    leading: tuple[int, ...] = (),
    *,
    tensors: bool = False,
) -> Any:
    """An observation of a space, [*leading, ...], as arrays in a dtype that the space's can hold, tensors as such."""
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping) or any(key not in obs for key in space.spaces):
            raise FaultyEnvironmentError(index, f"answered the {name} {_told(obs)}: it must have {list(space.spaces)}")
        return {
            key: _observation(obs[key], part, f"{name}, key {key!r}", index, leading, tensors=tensors)
            for key, part in space.spaces.items()
        }
    shape = (*leading, *(space.shape or ()))
    if tensors and isinstance(obs, Tensor):
        return _tensor_of(obs, space, shape, name, index)
    array = as_numbers(obs)
    if array is not None and array.shape == (*shape, 1) and not space.shape:
        # single numbers, as Stable-Baselines3 takes them too
        array = array.reshape(shape)
    if array is None or array.shape != shape:
        raise FaultyEnvironmentError(index, f"answered the {name} {_told(obs)}: {space} wants the shape {shape}")
    if array.dtype == space.dtype or (array.dtype.kind == "f" and array.dtype.isnative and array.dtype.itemsize <= 8):
        # floats of spaces of whole numbers come from normalisation
        return array
    converted = array.astype(np.float32 if array.dtype.kind == "f" else space.dtype)
    if array.dtype.kind in "iu" and not np.array_equal(converted, array):
        raise FaultyEnvironmentError(
            index, f"answered the {name} with numbers that {space} of {space.dtype} cannot hold"
        )
    return converted


def _tensor_of(obs: Tensor, space: spaces.Space[Any], shape: tuple[int, ...], name: str, index: int | None) -> Tensor:
    """As `_observation` does it, without leaving the device."""
    if obs.shape == (*shape, 1) and not space.shape:
        obs = obs.reshape(shape)
    if obs.shape != shape or obs.is_complex():
        raise FaultyEnvironmentError(index, f"answered the {name} {_told(obs)}: {space} wants the shape {shape}")
    wanted = torch.from_numpy(np.zeros(1, space.dtype)).dtype
    # NumPy has no bfloat16, which may come from a network in the environment
    if obs.dtype == wanted or (obs.is_floating_point() and obs.dtype != torch.bfloat16):
        return obs.detach()
    converted = obs.detach().to(torch.float32 if obs.is_floating_point() else wanted)
    if not obs.is_floating_point() and not torch.equal(converted.to(obs.dtype), obs):
        raise FaultyEnvironmentError(
            index, f"answered the {name} with numbers that {space} of {space.dtype} cannot hold"
        )
    return converted


def _info(info: Any, index: int, place: str) -> dict[str, Any]:
    if not isinstance(info, Mapping):
        raise FaultyEnvironmentError(index, f"answered the info {_told(info)} {place}: must be a dict, {{}} at least")
    return info if isinstance(info, dict) else dict(info)


def as_numbers(values: Any) -> np.ndarray | None:
    """An array of booleans, whole or real numbers, from whatever holds some; None if these are none."""
    try:
        array = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    # lists of unequal length, objects that refuse
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _told(value: Any) -> str:
    """A value in few words: its kind, and its shape or length where it has one."""
    if isinstance(value, np.ndarray | Tensor):
        return f"of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, tuple | list | Mapping):
        return f"of type {type(value).__name__} with {len(value)} entries"
    return f"{value!r:.80} of type {type(value).__name__}"


# What an environment may do without.


def innermost(env: VecEnv) -> Any:
    """What all vector wrappers stand around; some wrappers stand around what is no `VecEnv`."""
    inner: Any = env
    while isinstance(inner, VecEnvWrapper) and "venv" in vars(inner):
        inner = inner.venv
    return inner


def has_method(env: VecEnv, name: str) -> bool:
    """Whether every environment has a method of this name; one that cannot tell has none."""
    inner = innermost(env)
    trusted = isinstance(inner, SubprocVecEnv)
    if trusted and hasattr(inner, "has_method"):
        return bool(inner.has_method(name))
    try:
        if not env.has_attr(name):
            return False
        # processes would have to send what they have
        found = [] if trusted else env.get_attr(name)
    except _NO_ANSWER:
        return False
    return trusted or (isinstance(found, Sequence) and len(found) == env.num_envs and all(map(callable, found)))


def calls_one_alone(env: VecEnv) -> bool:
    """Whether methods can be called in one environment and not in the others."""
    return bool(getattr(innermost(env), "calls_one_alone", True))


def seed_envs(env: VecEnv, seed: int | None) -> None:
    """Seed the next reset; warns where an environment cannot be seeded."""
    try:
        env.seed(seed)
    except LACKING:
        if seed is not None:
            warnings.warn(
                f"{type(innermost(env)).__name__} takes no seed: its episodes do not follow from seed={seed}",
                stacklevel=2,
            )


def render_mode(env: VecEnv) -> str | None:
    """How the environments draw; None where they do not."""
    try:
        mode = env.render_mode
    except LACKING:
        return None
    return mode if isinstance(mode, str) else None


def first_image(env: VecEnv) -> np.ndarray | None:
    """What the first environment draws, uint8 [height, width, 3]; None where it draws nothing."""
    try:
        images = env.get_images()
    # drawing may need a package that is not there
    except (*LACKING, gymnasium.error.DependencyNotInstalled):
        return None
    return None if not images or images[0] is None else np.asarray(images[0], np.uint8)


def copies(env: VecEnv) -> set[int]:
    """What tells environments apart, however they are wrapped."""
    inner = innermost(env)
    if isinstance(inner, DummyVecEnv):
        return {id(one.unwrapped) for one in inner.envs}
    return {id(getattr(getattr(inner, "env", inner), "unwrapped", inner))}


def map_obs(function: Callable[..., Any], obs: Any, *others: Any) -> Any:
    """Apply `function` to an observation, or to every entry of a dict.

    Args:
        function: receives one entry of each observation.
        obs: an array, a tensor, a space or the like; or a dict of those.
        *others: further observations with the same keys.
    """
    if isinstance(obs, dict):
        return {key: function(part, *(other[key] for other in others)) for key, part in obs.items()}
    return function(obs, *others)


def entries(obs: Any) -> Iterator[tuple[str | None, Any]]:
    """The entries of an observation and their keys; one that is no dict has the key None."""
    yield from obs.items() if isinstance(obs, dict) else [(None, obs)]


def rows_of(obs: Any) -> int:
    """Number of rows of observations [n, ...]."""
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


# In the info of a step that did not happen, because the environment was lost or only reset in it; tells why.
SKIPPED = "skipped_step"


def check_step(env: VecEnv, obs: Any, rewards: np.ndarray, infos: Sequence[dict[str, Any]], place: str) -> None:
    """Refuse what the environments answered if there is NaN or infinity in it.

    Args:
        env: that answered.
        obs: [n_envs, ...] or a dict of those.
        rewards: [n_envs].
        infos: of the step; final observations are checked too.
        place: where this happens, for the message.

    Raises:
        FloatingPointError: names the quantity, the environment and the step.
    """
    if not (_is_finite(rewards) and _is_finite(obs)):
        normalizer = unwrap_vec_normalize(env)
        if normalizer is not None:
            # of a single NaN, normalising makes one everywhere
            _check_rows(normalizer.get_original_reward(), "reward", place)
            _check_rows(normalizer.get_original_obs(), "observation", place)
        _check_rows(rewards, "reward", place)
        _check_rows(obs, "observation", place)
    for env_index, info in enumerate(infos):
        if "terminal_observation" in info:
            _check_one(info["terminal_observation"], f"final observation of environment {env_index}", place)


def check_first_observations(env: VecEnv, obs: Any) -> None:
    """Refuse observations [n_envs, ...] before a rollout if there is NaN or infinity in them.

    Raises:
        FloatingPointError: names the environment and the entry.
    """
    if not _is_finite(obs):
        normalizer = unwrap_vec_normalize(env)
        if normalizer is not None:
            _check_rows(normalizer.get_original_obs(), "observation", "before the rollout")
        _check_rows(obs, "observation", "before the rollout")


def _is_finite(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        # as nearly always
        return values.dtype.kind != "f" or bool(np.isfinite(values).all())
    if isinstance(values, Tensor):
        # a sum is one quick pass; where it is not finite, it may only have been too large
        return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())
    if isinstance(values, dict):
        return all(map(_is_finite, values.values()))
    return _is_finite(np.asarray(values))


def _check_rows(values: Any, name: str, place: str) -> None:
    for env_index in range(rows_of(values)):
        row = map_obs(itemgetter(env_index), values)
        _check_one(row, f"{name} of environment {env_index}", place)


def _check_one(values: Any, name: str, place: str) -> None:
    for key, part in entries(values):
        array = part.numpy(force=True) if isinstance(part, Tensor) else np.asarray(part)
        if not _is_finite(array):
            entry = tuple(int(index) for index in np.argwhere(~np.isfinite(array))[0])
            where = ("" if key is None else f" under the key {key!r}") + (f" at index {list(entry)}" if entry else "")
            raise FloatingPointError(f"the {name} is {array[entry]}{where} {place}")


def rewards_without_skipped(rewards: np.ndarray, values: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """Rewards [n_envs] under which steps that did not happen (`skipped`, bool [n_envs]) teach nothing.

    Where an environment was lost, its episode ends before the step. With the value [n_envs] of the observation acted
    on as reward, and nothing after it, the advantage of the step is 0, and the steps before are valued as if a time
    limit had cut the episode there.
    """
    if skipped.any():
        rewards = rewards.astype(values.dtype)
        rewards[skipped] = values[skipped]
    return rewards


def skipped_steps(infos: Sequence[dict[str, Any]]) -> np.ndarray:
    """Where the step did not happen, bool [n_envs]."""
    skipped = np.zeros(len(infos), bool)
    for row, info in enumerate(infos):
        if SKIPPED in info:
            skipped[row] = True
    return skipped
