"""What is known about a task before any agent has been trained on it."""

from typing import Any, NamedTuple

import gymnasium as gym


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
