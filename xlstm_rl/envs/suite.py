"""What each task of the suite tests, and how it is made longer than it was in training."""

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


class SuiteTask(NamedTuple):
    """What a task is for.

    Attributes:
        ability: one of ABILITIES.
        length: the parameter that makes episodes longer and leaves observations and actions as they are; None where
            there is none.
        odd: whether the length must be odd.
    """

    ability: str
    length: str | None = None
    odd: bool = False


SUITE = {
    "xlstm_rl/CueRecall-v0": SuiteTask("hold", "delay"),
    "xlstm_rl/RepeatFirst-v0": SuiteTask("hold", "length"),
    "xlstm_rl/TMaze-v0": SuiteTask("hold", "corridor_length"),
    "xlstm_rl/RepeatPrevious-v0": SuiteTask("window", "length"),
    "xlstm_rl/Copy-v0": SuiteTask("capacity", "num_items"),
    # More pairs need more keys, hence other observations.
    "xlstm_rl/KeyValueRecall-v0": SuiteTask("capacity"),
    "xlstm_rl/Overwrite-v0": SuiteTask("revision", "num_writes"),
    "xlstm_rl/NearestSoFar-v0": SuiteTask("revision", "num_items"),
    "xlstm_rl/Parity-v0": SuiteTask("state tracking", "length"),
    "xlstm_rl/Cycle-v0": SuiteTask("state tracking", "num_moves"),
    "xlstm_rl/ShellGame-v0": SuiteTask("state tracking", "num_swaps"),
    "xlstm_rl/NoisyEvidence-v0": SuiteTask("filtering", "num_samples", odd=True),
    "xlstm_rl/CartPoleNoVelocity-v0": SuiteTask("filtering", "max_episode_steps"),
    # The known ends of these hold for their own step limit only.
    "xlstm_rl/PendulumNoVelocity-v0": SuiteTask("filtering"),
    "xlstm_rl/AcrobotNoVelocity-v0": SuiteTask("filtering"),
    "xlstm_rl/KeyDoor-v0": SuiteTask("credit", "delay"),
}


def suite_task(env_id: str) -> SuiteTask:
    """What a registered task is for; ability "other" for tasks that are not of the suite."""
    return SUITE.get(env_id.rpartition(":")[2], SuiteTask("other"))


def longer(env_id: str, kwargs: Mapping[str, Any], task: SuiteTask, factor: int) -> dict[str, Any] | None:
    """Keyword arguments of a task at `factor` times its length.

    Args:
        env_id: a registered id.
        kwargs: of the task as it was trained; the length may be left to its default.
        task: says which parameter is the length.
        factor: at least 1.

    Returns:
        The keyword arguments; None where the task has no length.

    Raises:
        ValueError: the task takes no such parameter, or it is no whole number there.
    """
    if task.length is None:
        return None
    length = kwargs[task.length] if task.length in kwargs else _default(env_id, task.length)
    if not isinstance(length, int):
        raise ValueError(f"{task.length}={length!r} of {env_id!r} is no length: it must be a whole number")
    length = length * factor
    return {**kwargs, task.length: length - 1 if task.odd and length % 2 == 0 else length}


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
