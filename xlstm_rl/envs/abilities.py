"""What ability each task tests, and how the task is made longer than it was in training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

ABILITIES = (
    *("hold", "window", "capacity", "revision", "state tracking", "filtering", "credit", "self-directed"),
    "other",
)


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


PURPOSES = {
    "xlstm_rl/CueRecall-v0": TaskPurpose("hold", "delay"),
    "xlstm_rl/RepeatFirst-v0": TaskPurpose("hold", "length"),
    "xlstm_rl/TMaze-v0": TaskPurpose("hold", "corridor_length"),
    "xlstm_rl/RepeatPrevious-v0": TaskPurpose("window", "length"),
    "xlstm_rl/Copy-v0": TaskPurpose("capacity", "num_items"),
    # More pairs need more keys, hence other observations.
    "xlstm_rl/KeyValueRecall-v0": TaskPurpose("capacity"),
    "xlstm_rl/Overwrite-v0": TaskPurpose("revision", "num_writes"),
    "xlstm_rl/NearestSoFar-v0": TaskPurpose("revision", "num_items"),
    "xlstm_rl/Parity-v0": TaskPurpose("state tracking", "length"),
    "xlstm_rl/Cycle-v0": TaskPurpose("state tracking", "num_moves"),
    "xlstm_rl/ShellGame-v0": TaskPurpose("state tracking", "num_swaps"),
    "xlstm_rl/NoisyEvidence-v0": TaskPurpose("filtering", "num_samples", odd=True),
    "xlstm_rl/CartPoleNoVelocity-v0": TaskPurpose("filtering", "max_episode_steps"),
    # The known bounds of these hold for their own step limit only.
    "xlstm_rl/PendulumNoVelocity-v0": TaskPurpose("filtering"),
    "xlstm_rl/AcrobotNoVelocity-v0": TaskPurpose("filtering"),
    "xlstm_rl/KeyDoor-v0": TaskPurpose("credit", "delay"),
    # More pairs need other observations, more turns make it easier.
    "xlstm_rl/Pairs-v0": TaskPurpose("self-directed"),
    "xlstm_rl/Bandit-v0": TaskPurpose("self-directed", "num_pulls"),
}


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
