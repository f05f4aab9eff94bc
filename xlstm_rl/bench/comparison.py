"""What one benchmark did better or worse than another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xlstm_rl.bench.card import common_scores, spell
from xlstm_rl.bench.documents import Section, Table, to_markdown
from xlstm_rl.bench.results import Record, Results
from xlstm_rl.bench.statistics import difference, estimate, probability_of_improvement
from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.validation import nearest


def compare(before: Results, after: Results, agents: tuple[str, str] | None = None) -> str:
    """Markdown tables of the differences between two benchmarks, on the tasks and seeds that both have.

    What was not the same on both sides (budgets, seeds, settings, versions) stands above the tables.

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
    unequal = [line for one, two in pairs for line in _unequal(before, one, after, two, tasks)]
    if unequal:
        sections.insert(0, Section("Not the same on both sides", list(dict.fromkeys(unequal))))
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


# What records tell of the settings of a run, in words.
_SETTINGS: dict[str, Callable[[Record], Any]] = {
    "steps of training": lambda record: f"{record.total_steps:,}",
    "episodes": lambda record: record.greedy.episodes,
    "memory": lambda record: record.memory,
    "parameters": lambda record: f"{record.parameters:,}",
    "runs spent on tuning": lambda record: record.tuning_runs,
}


def _unequal(before: Results, one: str, after: Results, two: str, tasks: Sequence[str]) -> list[str]:
    """Sentences about settings, seeds and versions that differ between two agents on the tasks of both."""
    name = one if one == two else f"{one} and {two}"
    said: list[str] = []
    old, new = (
        [record for record in results.records if record.agent == agent and record.task in tasks]
        for results, agent in ((before, one), (after, two))
    )
    for what, read in _SETTINGS.items():
        # other agents are compared for what they are; of budgets one wants to know
        if one == two or what in ("steps of training", "episodes"):
            said += [
                f"{name}, {task}: {what} {values[0]} before, {values[1]} after."
                for task in tasks
                if all(values := _by_task(task, old, new, read)) and values[0] != values[1]
            ]
    others = [
        task
        for task in tasks
        if all(prints := _by_task(task, old, new, lambda r: r.fingerprint)) and prints[0] != prints[1]
    ]
    if one == two and not said and others:
        said.append(f"{name}: settings that records do not hold differ on {', '.join(others)}; the specs have them.")
    for task in tasks:
        seeds = _by_task(task, old, new, lambda record: record.seed)
        if all(seeds) and seeds[0] != seeds[1]:
            said.append(f"{name}, {task}: seeds {seeds[0]} before, {seeds[1]} after; pairs are made of those of both.")
    keys = sorted({key for record in (*old, *new) for key in record.versions})
    for key in keys:
        found = [", ".join(sorted({str(record.versions.get(key, "-")) for record in side})) for side in (old, new)]
        if found[0] and found[1] and found[0] != found[1]:
            said.append(f"{key} {found[0]} before, {found[1]} after.")
    return said


def _by_task(task: str, old: Sequence[Record], new: Sequence[Record], read: Callable[[Record], Any]) -> tuple[str, str]:
    """What the runs of a task have on both sides, each value once; empty where there are none."""
    sides = ((read(record) for record in side if record.task == task) for side in (old, new))
    before, after = (", ".join(map(str, sorted(set(values)))) for values in sides)
    return before, after


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
