"""What is known about a finished run, as plain values that JSON holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """The outcome of some episodes.

    Attributes:
        mean_return: over the episodes.
        standard_error: of the mean return.
        score: 0 for the best policy without memory, 1 for the optimum.
        episodes: how many were played; each is several in a row where `Record.in_a_row` says so.
    """

    mean_return: float
    standard_error: float
    score: float
    episodes: int


@dataclass(frozen=True)
class StateHealth:
    """The memory state of one environment over the longest episodes that were played.

    Attributes:
        bytes_first, bytes_last: after the first and the last step; equal where the state does not grow.
        largest: the largest absolute value met.
        finite: whether every value was.
        length: at how many times the training length, or how many episodes in a row.
    """

    bytes_first: int
    bytes_last: int
    largest: float
    finite: bool
    length: int


@dataclass(frozen=True)
class Record:
    """What one run showed.

    Attributes:
        task, agent, seed: which run.
        fingerprint: of all settings, see `xlstm_rl.bench.plan.fingerprint`.
        ability: what the task tests.
        env: its environment id.
        memory: name of the memory, with its blocks where it has such.
        parameters, memory_parameters: of the whole policy, and of the actor's memory alone.
        tuning_runs: spent on the agent's settings.
        total_steps, steps: environment steps planned and trained; fewer where training ended early as solved.
        optimal_return, memoryless_return: the bounds of the score.
        curve: [step, mean return] of each evaluation during training.
        greedy, sampled: final weights, with the mode of the policy and with samples of it.
        emptied: greedy, with the memory emptied at every step.
        oracle: the scripted oracle in episodes of the same seeds; None where the environment has none.
        longer: greedy at "4" and "16" times the training length, the state carried.
        state: of the memory.
        cpu_minutes: of all starts of the run, measuring included; without what environments in processes of their own
            spent (`env.vec=subproc`).
        versions: packages, platform and machine.
        in_a_row: whether `longer` is of so many episodes in a row, as in tasks without a length.
    """

    task: str
    agent: str
    seed: int
    fingerprint: str
    ability: str
    env: str
    memory: str
    parameters: int
    memory_parameters: int
    tuning_runs: int
    total_steps: int
    steps: int
    optimal_return: float
    memoryless_return: float
    curve: list[list[float]]
    greedy: Figure
    sampled: Figure
    emptied: Figure
    oracle: Figure | None
    longer: dict[str, Figure]
    state: StateHealth
    cpu_minutes: float
    versions: dict[str, Any]
    in_a_row: bool = False

    @property
    def curve_scores(self) -> list[tuple[int, float]]:
        """(step, score) of each evaluation during training."""
        span = self.optimal_return - self.memoryless_return
        return [(int(step), (mean_return - self.memoryless_return) / span) for step, mean_return in self.curve]

    @property
    def worst_of_last_five(self) -> float | None:
        """The lowest score of the last five evaluations during training; None before there were five."""
        scores = [score for _, score in self.curve_scores[-5:]]
        return min(scores) if len(scores) == 5 else None

    def steps_to(self, score: float) -> int | None:
        """Steps at the first evaluation that reached a score; None where none did."""
        return next((step for step, reached in self.curve_scores if reached >= score), None)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Record:
        """From what `dataclasses.asdict` or parsed JSON gives.

        Raises:
            ValueError: these are no such values.
        """
        try:
            parts = dict(values)
            for name in ("greedy", "sampled", "emptied", "oracle"):
                parts[name] = None if parts[name] is None else Figure(**parts[name])
            parts["longer"] = {length: Figure(**figure) for length, figure in parts["longer"].items()}
            parts["state"] = StateHealth(**parts["state"])
            return cls(**parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no record of a run: {error!r}") from error
