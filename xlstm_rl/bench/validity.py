"""Without what a card says nothing: the oracle, the agent without memory, the emptied memory, equal conditions."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from xlstm_rl.bench.results import Figure, Record, Results
from xlstm_rl.bench.statistics import estimate

# What a score may be off besides its sampling error.
TOLERANCE = 0.01
# Above this a score without memory is more than the task allows.
EMPTIED_TOLERANCE = 0.1
SIZE_TOLERANCE = 0.1


class Check(NamedTuple):
    """A question about the card and its answer.

    Attributes:
        question: what must hold.
        problems: where it does not; empty if it holds.
        unknown: where it cannot be told.
    """

    question: str
    problems: list[str]
    unknown: list[str]

    @property
    def answer(self) -> str:
        """In a word."""
        return "no" if self.problems else "not known" if self.unknown else "yes"


def check(results: Results) -> list[Check]:
    """All checks of a card."""
    # without known bounds there is nothing to hold the returns against
    of_bounds = [] if results.score == "return" else [_oracle(results), _without_memory(results), _emptied(results)]
    return [
        *of_bounds,
        _equal_size(results),
        _equal_tuning(results),
        _state(results),
        _complete(results),
    ]


def _oracle(results: Results) -> Check:
    problems, unknown = [], []
    for task in results.tasks:
        # runs of one seed play the same episodes, whatever their agents; those of other seeds play others
        by_seed: dict[int, list[tuple[float, float]]] = {}
        for record in results.records:
            if record.task == task and record.oracle is not None:
                figure = (record.oracle.score, _error(record, record.oracle))
                by_seed.setdefault(record.seed, []).append(figure)
        if not by_seed:
            unknown.append(f"{task}: no scripted oracle")
            continue
        scores, errors = np.array([np.mean(figures, axis=0) for figures in by_seed.values()]).T
        mean, error = float(scores.mean()), math.sqrt(float(np.square(errors).sum())) / len(errors)
        if abs(mean - 1) > TOLERANCE + 3 * error:
            problems.append(f"{task}: {mean:.3f}")
    return Check("The scripted oracle scores 1 in the episodes that the agents played", problems, unknown)


def _without_memory(results: Results) -> Check:
    problems, unknown = [], []
    for task in results.tasks:
        groups = [group for agent in results.agents if (group := results.of(task, agent)) and group[0].memory == "none"]
        if not groups:
            unknown.append(f"{task}: no such run yet")
        for group in groups:
            value, low, _ = estimate([np.array([record.greedy.score for record in group])])
            low = value if math.isnan(low) else low
            if low > TOLERANCE + 2 * max(_error(record, record.greedy) for record in group):
                problems.append(f"{task}: at least {low:.2f}")
    return Check("The same training without memory is not above the best policy without memory", problems, unknown)


def _emptied(results: Results) -> Check:
    problems = []
    for task, agent, group in _groups(results):
        value = estimate([np.array([record.emptied.score for record in group])]).value
        noise = 2 * max(_error(record, record.emptied) for record in group)
        if value > EMPTIED_TOLERANCE + noise:
            problems.append(f"{task}, {agent}: {value:.2f}")
    return Check("With the memory emptied at every step the score is gone", problems, [])


def _equal_size(results: Results) -> Check:
    first, problems, unknown = results.agents[0], [], []
    for task in results.tasks:
        for agent in results.agents[1:]:
            # one that was sized after another agent is compared with that one
            mine, others = results.of(task, results.parameters_of.get(agent, first)), results.of(task, agent)
            if mine and others and others[0].memory == "lstm":
                ratio = others[0].memory_parameters / max(mine[0].memory_parameters, 1)
                if abs(ratio - 1) > SIZE_TOLERANCE:
                    problems.append(f"{task}, {agent}: {ratio:.2f} times as many")
        if not any(group and group[0].memory == "lstm" for group in (results.of(task, a) for a in results.agents)):
            unknown.append(f"{task}: no LSTM run yet")
    return Check(
        f"An LSTM has as many memory parameters as {first}, or as the agent that it was sized after", problems, unknown
    )


def _equal_tuning(results: Results) -> Check:
    runs = {
        agent: max((r.tuning_runs for r in results.records if r.agent == agent), default=0) for agent in results.agents
    }
    said = [] if len({*runs.values()}) <= 1 else [f"{agent}: {count} runs" for agent, count in runs.items()]
    return Check("As many runs were spent on tuning each agent", said, [])


def _state(results: Results) -> Check:
    problems = []
    for task, agent, group in _groups(results):
        if any(record.state.bytes_first != record.state.bytes_last for record in group):
            problems.append(f"{task}, {agent}: the state grows")
        if not all(record.state.finite for record in group):
            problems.append(f"{task}, {agent}: the state is not finite")
    return Check("The memory state keeps its size and stays finite in the longest episodes", problems, [])


def _complete(results: Results) -> Check:
    problems = [f"{name} failed" for name in results.failures]
    if results.missing:
        problems.append(f"{len(results.missing)} runs are not done")
    return Check("Every planned run was finished", problems, [])


def _groups(results: Results) -> list[tuple[str, str, list[Record]]]:
    pairs = [(task, agent, results.of(task, agent)) for task in results.tasks for agent in results.agents]
    return [(task, agent, group) for task, agent, group in pairs if group]


def _error(record: Record, figure: Figure | None) -> float:
    """Standard error of a figure in units of score."""
    span = abs(record.optimal_return - record.memoryless_return)
    return 0.0 if figure is None else figure.standard_error / span
