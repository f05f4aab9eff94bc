"""What a training run is besides the agent: random numbers, running episodes, statistics of vector wrappers."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize

from xlstm_rl.agents.archive import CheckpointError, describe_part
from xlstm_rl.agents.checkpoint import TRAINING, File, load_model, read_contents, read_model, save_model
from xlstm_rl.agents.description import DescriptionError
from xlstm_rl.agents.normalization import normalizer_statistics, restore_statistics

if TYPE_CHECKING:
    from xlstm_rl.agents.ppo import RecurrentPPO

Model = TypeVar("Model", bound="RecurrentPPO")

# Whatever wrong values lead to where they are put back.
_RESTORE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class TrainingPoint(NamedTuple):
    """A training run between two rollouts."""

    attributes: dict[str, Any]
    """Of the model, those that a rollout changes."""
    random: dict[str, Any]
    """States of the generators of Python, NumPy and torch."""
    wrappers: list[Any]
    """State of every vector wrapper, the outermost first."""


@dataclass(frozen=True)
class Resumed(Generic[Model]):
    """A run that can go on."""

    model: Model
    notes: dict[str, Any]
    """As given to `save_checkpoint`."""
    restarted: str | None
    """Why all environments start new episodes; None if the running ones go on."""


def mark_point(model: OnPolicyAlgorithm) -> TrainingPoint:
    """Note the present, which must lie between two rollouts; the environments keep theirs until the next mark."""
    env = _env_of(model)
    if env.has_attr("mark_point"):
        env.env_method("mark_point")
    changing = ("num_timesteps", "ep_info_buffer", "ep_success_buffer")
    names = [name for name in vars(model) if name in changing or name.startswith("_last_")]
    # deep: acting writes memory states over those before
    attributes = {name: copy.deepcopy(vars(model)[name]) for name in names}
    return TrainingPoint(
        attributes, _random_state(model.device), [_wrapper_state(wrapper) for wrapper in _wrappers(env)]
    )


def save_checkpoint(model: RecurrentPPO, target: File, point: TrainingPoint | None, notes: Mapping[str, Any]) -> None:
    """Write the agent and the training run; see `RecurrentPPO.save_checkpoint`."""
    env = _env_of(model)
    if point is None:
        point = mark_point(model)
    episodes = env.env_method("resume_point") if env.has_attr("resume_point") else None
    state = {"random": point.random, "wrappers": point.wrappers, "episodes": episodes, "notes": dict(notes)}
    try:
        part = describe_part(state)
    except DescriptionError as error:
        warnings.warn(f"{error}: a resumed run will start new episodes", stacklevel=3)
        part = describe_part(state | {"episodes": None})
    present = {name: vars(model)[name] for name in point.attributes}
    vars(model).update(point.attributes)
    try:
        save_model(model, target, (), (), {TRAINING: part})
    finally:
        vars(model).update(present)


def resume_model(
    cls: type[Model],
    source: File,
    env: GymEnv,
    *,
    device: torch.device | str = "auto",
    custom_objects: Mapping[str, Any] | None = None,
) -> Resumed[Model]:
    """Read what `save_checkpoint` wrote and bring `env` to where it was; see `RecurrentPPO.resume`."""
    archive = read_model(source)
    if TRAINING not in archive.parts:
        raise CheckpointError(
            f"{archive.name} holds an agent without its training run: RecurrentPPO.load reads it, save_checkpoint "
            "writes files to resume from"
        )
    state = archive.value(TRAINING)
    given = custom_objects or {}
    contents = read_contents(cls, archive, given)
    model = load_model(cls, contents, env, device=device, given=given, force_reset=False)
    try:
        # replaying episodes may draw random numbers, so these come last
        restarted = _restore_env(_env_of(model), state)
        _set_random_state(state["random"], model.device)
        notes = dict(state["notes"])
    except _RESTORE_ERRORS as error:
        raise CheckpointError(f"{archive.name}, {TRAINING}.json: {type(error).__name__}: {error}") from error
    if restarted is not None:
        model._last_obs = None
        # other episodes than those at the start of training
        _env_of(model).seed(None if model.seed is None else _other_seed(model.seed, model.num_timesteps))
    return Resumed(model, notes, restarted)


def _other_seed(seed: int, num_timesteps: int) -> int:
    """Far from the seeds of all other environments, those of evaluations too."""
    return int(np.random.SeedSequence((seed, num_timesteps)).generate_state(1)[0]) // 2


def _env_of(model: OnPolicyAlgorithm) -> VecEnv:
    if model.env is None:
        raise ValueError("the agent has no environment: hand one to load, resume or set_env")
    return model.env


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
    if isinstance(wrapper, VecNormalize):
        running = {"returns": wrapper.returns, "old_reward": wrapper.old_reward, "old_obs": wrapper.old_obs}
        return {"statistics": normalizer_statistics(wrapper)} | copy.deepcopy(running)
    if isinstance(wrapper, VecFrameStack):
        return copy.deepcopy(_stacks(wrapper))
    if isinstance(wrapper, VecMonitor):
        return {name: copy.copy(getattr(wrapper, name)) for name in ("episode_returns", "episode_lengths")}
    if hasattr(type(wrapper), "get_state"):
        return copy.deepcopy(wrapper.get_state())
    return None


def _set_wrapper_state(wrapper: VecEnvWrapper, state: Any) -> None:
    if isinstance(wrapper, VecNormalize):
        restore_statistics(wrapper, state["statistics"])
        for name in ("returns", "old_reward", "old_obs"):
            setattr(wrapper, name, state[name])
    elif isinstance(wrapper, VecFrameStack):
        for key, stack in _stacks(wrapper).items():
            stack[...] = state[key]
    elif isinstance(wrapper, VecMonitor):
        wrapper.episode_returns, wrapper.episode_lengths = state["episode_returns"], state["episode_lengths"]
    elif hasattr(type(wrapper), "set_state"):
        wrapper.set_state(state)


def _stacks(wrapper: VecFrameStack) -> dict[str, np.ndarray]:
    """The stacked frames by key; one key for observations that are no Dict."""
    stacked: Any = wrapper.stacked_obs
    inner = getattr(stacked, "sub_stacked_observations", None)
    parts = {"": stacked} if inner is None else inner
    return {key: part.stacked_obs for key, part in parts.items()}


def _restore_env(env: VecEnv, state: Mapping[str, Any]) -> str | None:
    wrappers = list(_wrappers(env))
    if len(wrappers) != len(state["wrappers"]):
        raise ValueError(f"the run had {len(state['wrappers'])} vector wrappers, the environment has {len(wrappers)}")
    for wrapper, kept in zip(wrappers, state["wrappers"], strict=True):
        _set_wrapper_state(wrapper, kept)
    # loading seeded them, for a reset that does not come
    env.unwrapped._reset_seeds()
    points = state["episodes"]
    if points is None:
        return "their state was not noted (wrap each in xlstm_rl.envs.Resumable)"
    if not env.has_attr("resume_at"):
        return "these environments cannot be brought back (wrap each in xlstm_rl.envs.Resumable)"
    for index, point in enumerate(points):
        if point is None:
            return f"the episode of environment {index} was not kept: it was too long, or its worker had been restarted"
        if env.env_method("resume_at", point, indices=index) != [True]:
            return f"environment {index} is not deterministic: its episode, played again, went another way"
    return None
