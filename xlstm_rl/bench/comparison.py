"""What one benchmark did better or worse than another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xlstm_rl.bench.card import common_scores, spell
from xlstm_rl.bench.documents import Section, Table, to_markdown
from xlstm_rl.bench.results import Results
from xlstm_rl.bench.statistics import difference, estimate, probability_of_improvement
from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.errors import nearest


def compare(before: Results, after: Results, agents: tuple[str, str] | None = None) -> str:
    """Markdown tables of the differences between two benchmarks, on the tasks and seeds that both have.

    Args:
        before, after: the benchmarks; may be the same one.
        agents: one of `before` and one of `after` to compare; None compares all agents of equal name.

    Raises:
        ConfigError: an agent is unknown, or there is nothing in common.
    """
    pairs = [agents] if agents is not None else [(agent, agent) for agent in before.agents if agent in after.agents]
    if agents is not None:
        for agent, results in zip(agents, (before, after), strict=True):
            if agent not in results.agents:
                raise ConfigError(f"{agent!r} is no agent of {results.name}; {nearest(agent, results.agents)}")
    sections = [section for one, two in pairs if (section := _compare(before, one, after, two)) is not None]
    if not sections:
        raise ConfigError(f"{before.name} and {after.name} have no agent, task and seed in common; give --agents A B")
    return to_markdown(f"{before.name} and {after.name}", sections, Path())


def _compare(before: Results, one: str, after: Results, two: str) -> Section | None:
    tasks = [task for task in before.tasks if task in after.tasks]
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
