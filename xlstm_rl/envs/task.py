"""A task: how it is registered, what ability it tests, its known bounds, and how it is made longer than in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

ABILITIES = (
    *("hold", "window", "capacity", "revision", "state tracking", "filtering", "credit", "self-directed"),
    "other",
)

Maker = TypeVar("Maker", bound=Callable[..., gym.Env[Any, Any]])


class TaskFacts(NamedTuple):
    """Known bounds of a task, from which a score `(return - memoryless) / (optimal - memoryless)` follows.

    Exact for the memory tasks of this package; those of classic control are estimates, see `HideVelocity.facts`.

    Attributes:
        horizon: Most steps that an episode can take.
        optimal_return: Expected return of the best agent with perfect memory.
        memoryless_return: Expected return of the best policy that sees only the current observation; it is stationary
            and may be stochastic.
    """

    horizon: int
    optimal_return: float
    memoryless_return: float


def task_facts(env: gym.Env[Any, Any]) -> TaskFacts | None:
    """Facts of the outermost layer of `env` that states them, or None if none does."""
    if not env.has_wrapper_attr("facts"):
        return None
    facts = env.get_wrapper_attr("facts")
    return facts if isinstance(facts, TaskFacts) else None


class TaskPurpose(NamedTuple):
    """What a task is for.

    Attributes:
        ability: one of ABILITIES.
        length: the parameter that makes episodes longer and leaves observations and actions as they are, with bounds
            that are known at every length; None where there is none.
        odd: whether the length must be odd.
    """

    ability: str
    length: str | None = None
    odd: bool = False


PURPOSES: dict[str, TaskPurpose] = {}
"""Of the registered tasks, by id."""
_REGISTRATIONS: dict[str, dict[str, Any]] = {}


def task(name: str, ability: str, length: str | None = None, *, odd: bool = False) -> Callable[[Maker], Maker]:
    """Make a class, or a function that makes an environment, known to gymnasium as `xlstm_rl/<name>-v0`.

    Args:
        name: Of the task.
        ability: One of ABILITIES.
        length: See `TaskPurpose`.
        odd: See `TaskPurpose`.
    """

    def noted(maker: Maker) -> Maker:
        entry_point = f"{maker.__module__}:{maker.__qualname__}"
        register_task(name, TaskPurpose(ability, length, odd), {"entry_point": entry_point})
        return maker

    return noted


def register_task(name: str, purpose: TaskPurpose, registration: dict[str, Any]) -> None:
    """Note a task that is registered by other arguments of `gymnasium.register` than `task` has."""
    if purpose.ability not in ABILITIES:
        raise ValueError(f"ability {purpose.ability!r} of task {name!r} is none of {', '.join(ABILITIES)}")
    PURPOSES[f"xlstm_rl/{name}-v0"] = purpose
    _REGISTRATIONS[f"xlstm_rl/{name}-v0"] = registration


def register_envs() -> None:
    """Register every task as `xlstm_rl/<Name>-v0`; calling it again changes nothing."""
    for env_id, registration in _REGISTRATIONS.items():
        if env_id not in gym.registry:
            gym.register(env_id, **registration)


def task_purpose(env_id: str) -> TaskPurpose:
    """What a registered task is for; ability "other" for tasks that are not of the suite."""
    return PURPOSES.get(env_id.rpartition(":")[2], TaskPurpose("other"))


def longer(env_id: str, kwargs: Mapping[str, Any], length: str, factor: int, *, odd: bool = False) -> dict[str, Any]:
    """Keyword arguments of a task at `factor` times its length.

    Args:
        env_id: a registered id.
        kwargs: of the task as it was trained; the length may be left to its default.
        length: the parameter.
        factor: at least 1.
        odd: whether the length must be odd.

    Raises:
        ValueError: the task takes no such parameter, or it is no whole number there.
    """
    value = kwargs[length] if length in kwargs else _default(env_id, length)
    if not isinstance(value, int):
        raise ValueError(f"{length}={value!r} of {env_id!r} is no length: it must be a whole number")
    value = value * factor
    return {**kwargs, length: value - 1 if odd and value % 2 == 0 else value}


def _default(env_id: str, name: str) -> Any:
    spec = gym.spec(env_id.rpartition(":")[2])
    if name == "max_episode_steps":
        return spec.max_episode_steps
    if name in spec.kwargs:
        return spec.kwargs[name]
    entry_point = spec.entry_point
    create = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    parameters = inspect.signature(create).parameters if create is not None else {}
    if name not in parameters:
        raise ValueError(f"{env_id!r} takes no parameter {name!r}; known: {', '.join(parameters)}")
    return parameters[name].default
