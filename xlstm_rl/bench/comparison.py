"""What one benchmark did better or worse than another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from xlstm_rl.bench.card import common_scores, spell
from xlstm_rl.bench.documents import Section, Table, to_markdown
from xlstm_rl.bench.results import Record, Results
from xlstm_rl.bench.statistics import difference, estimate, probability_of_improvement
from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.validation import nearest


def compare(before: Results, after: Results, agents: tuple[str, str] | None = None) -> str:
    """Markdown tables of the differences between two benchmarks, on the tasks and seeds that both have.

    Tasks of one name whose environments or bounds differ are not the same; they are left out, and the text says so.

    Args:
        before, after: the benchmarks; may be the same one.
        agents: one of `before` and one of `after` to compare; None compares all agents of equal name.

    Raises:
        ConfigError: an agent is unknown, or there is nothing in common.
    """
    differing = _differing(before, after)
    pairs = [agents] if agents is not None else [(agent, agent) for agent in before.agents if agent in after.agents]
    if agents is not None:
        for agent, results in zip(agents, (before, after), strict=True):
            if agent not in results.agents:
                raise ConfigError(f"{agent!r} is no agent of {results.name}; {nearest(agent, results.agents)}")
    tasks = [task for task in before.tasks if task in after.tasks and task not in differing]
    sections = [section for one, two in pairs if (section := _compare(before, one, after, two, tasks)) is not None]
    if not sections:
        others = "".join(f"; task {task} is another one: {how}" for task, how in differing.items())
        shared = set(before.tasks) & set(after.tasks)
        remedy = "give --agents A B" if shared else f"the tasks are {', '.join(before.tasks)}; {', '.join(after.tasks)}"
        raise ConfigError(f"{before.name} and {after.name} have no agent, task and seed in common; {remedy}{others}")
    if differing:
        said = [f"{task} is not the same task on both sides: {how}." for task, how in differing.items()]
        sections.append(Section("Left out", said))
    return to_markdown(f"{before.name} and {after.name}", sections, Path())


def _differing(before: Results, after: Results) -> dict[str, str]:
    """Tasks that the two sides have by name but not in fact -> how they differ."""
    one, two = ({record.task: record for record in results.records} for results in (before, after))
    return {
        task: f"{_in_words(one[task])} in {before.name}, {_in_words(two[task])} in {after.name}"
        for task in before.tasks
        if task in one and task in two and not _same_task(one[task], two[task])
    }


def _same_task(one: Record, two: Record) -> bool:
    # bounds are computed, and another machine may round their last digit in another way
    ends = ((one.optimal_return, two.optimal_return), (one.memoryless_return, two.memoryless_return))
    return one.env == two.env and all(math.isclose(*pair, rel_tol=1e-9, abs_tol=1e-12) for pair in ends)


def _in_words(record: Record) -> str:
    return f"{record.env} with {record.memoryless_return:.6g} to {record.optimal_return:.6g}"


def _compare(before: Results, one: str, after: Results, two: str, tasks: Sequence[str]) -> Section | None:
    rows = [row for task in tasks if (row := _row(task, [task], before, one, after, two)) is not None]
    whole = _row("all tasks", tasks, before, one, after, two)
    if whole is None:
        return None
    columns = ["task", "runs", "before", "after", "difference", "probability of improvement"]
    text = (
        f"Before: {one} of {before.name}. After: {two} of {after.name}. Interquartile means of the final score with "
        "bootstrap 95 % intervals; runs of one seed are pairs."
    )
    return Section(one if one == two else f"{one} and {two}", [text, Table(columns, [whole, *rows])])


def _row(name: str, tasks: Sequence[str], before: Results, one: str, after: Results, two: str) -> list[str] | None:
    old, new = common_scores(before, one, after, two, tasks)
    if not old:
        return None
    return [
        name,
        str(sum(map(len, old))),
        spell(estimate(old)),
        spell(estimate(new)),
        spell(difference(old, new)),
        spell(probability_of_improvement(old, new)),
    ]
