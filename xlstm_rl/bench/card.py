"""The report card of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.bench.documents import Code, Picture, Section, Table, to_html, to_markdown
from xlstm_rl.bench.figures import draw_all
from xlstm_rl.bench.results import Record, Results
from xlstm_rl.bench.statistics import (
    Estimate,
    estimate,
    interquartile_mean,
    probability_of_improvement,
    wilson_interval,
)
from xlstm_rl.bench.validity import Check, check
from xlstm_rl.configs import ConfigError

FAILURE_LINES = 12


def render(results: Results, out: Path) -> None:
    """Write card.md, card.html and figures/ to a folder.

    Raises:
        ConfigError: no run has finished yet.
    """
    if not results.records:
        raise ConfigError(f"{out} has no finished run to show; go on with `xlstm-rl bench run`")
    figures = out / "figures"
    draw_all(results, figures)
    sections = card_sections(results, figures)
    title = f"Benchmark {results.name}"
    write_whole(out / "card.md", to_markdown(title, sections, out).encode())
    write_whole(out / "card.html", to_html(title, sections).encode())


def card_sections(results: Results, figures: Path) -> list[Section]:
    """The card, to be written as Markdown or HTML.

    Args:
        results: with one record at least.
        figures: the folder that `draw_all` filled.
    """
    checks = check(results)
    if results.score == "return":
        return _sections_of_returns(results, checks, figures)
    return [
        Section("Overall", [_state_of(results, checks), _overall(results)]),
        Section("Tasks", [_legend(results), _tasks(results)]),
        Section(
            "Abilities",
            [
                "Interquartile mean of the score over the runs of all tasks of an ability, with its 95 % interval.",
                _abilities(results),
                Picture(figures / "abilities.png", "Score by ability"),
            ],
        ),
        Section("Validity checks", [_checks(checks), *_notes(checks)]),
        Section(
            "Figures",
            [
                Picture(figures / "curves.png", "Score of evaluations during training"),
                Picture(
                    figures / "lengths.png",
                    "Score in episodes longer than those of training, or in several in a row (r)",
                ),
                Picture(figures / "profiles.png", "Share of runs above a score"),
            ],
        ),
        *_failures(results),
        Section("How it was made", _making(results)),
    ]


def _sections_of_returns(results: Results, checks: Sequence[Check], figures: Path) -> list[Section]:
    """The card of tasks whose returns are shown as they are, beside those that others published."""
    planned = len(results.records) + len(results.failures) + len(results.missing)
    legend = (
        f"{len(results.records)} of {planned} runs. Mean returns of the final weights, played greedily and, after the "
        "slash, with sampled actions: mean over the seeds ± their standard deviation. In brackets the seeds, where "
        "they are fewer than the most, and the steps. Emptied: greedy, with the memory emptied at every step."
    )
    pictures = [Picture(figures / "curves.png", "Mean return of evaluations during training")]
    if results.published:
        pictures.insert(0, Picture(figures / "published.png", "Mean returns beside published ones"))
    return [
        Section("Returns", [legend, _returns(results)]),
        Section("Figures", pictures),
        Section("Validity checks", [_checks(checks), *_notes(checks)]),
        *_failures(results),
        Section("How it was made", _making(results)),
    ]


def _returns(results: Results) -> Table:
    first = results.agents[0]
    columns = list(dict.fromkeys(name for figures in results.published.values() for name in figures))
    rows = []
    for task in results.tasks:
        groups = [results.of(task, agent) for agent in results.agents]
        if any(groups):
            most = max(map(len, groups))
            known = results.published.get(task, {})
            emptied = [record.emptied.mean_return for record in groups[0]]
            rows.append(
                [
                    task,
                    *(_returns_of(group, most) for group in groups),
                    number(float(np.mean(emptied))) if emptied else "-",
                    *(number(known[name]) if name in known else "-" for name in columns),
                ]
            )
    rows += _mean_row(results, columns)
    return Table(["task", *results.agents, f"{first}, emptied", *columns], rows)


def _returns_of(group: Sequence[Record], most: int) -> str:
    if not group:
        return "-"
    said = []
    for figures in ([record.greedy for record in group], [record.sampled for record in group]):
        values = [figure.mean_return for figure in figures]
        spread = f" ± {number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
        said.append(f"{number(float(np.mean(values)))}{spread}")
    seeds = "" if len(group) == most else f"{len(group)} seed{'s' * (len(group) > 1)}, "
    steps = np.mean([record.steps for record in group])
    return f"{said[0]} / {said[1]} ({seeds}{steps / 1000:,.0f}k)"


def _mean_row(results: Results, columns: Sequence[str]) -> list[list[str]]:
    """Means over the tasks for which the first agent and all columns have figures; none of an agent that lacks some."""
    first = results.agents[0]
    tasks = [
        name for name in results.tasks if results.of(name, first) and columns == [*results.published.get(name, {})]
    ]
    if len(tasks) < 2 or not columns:
        return []
    row = [f"mean of {len(tasks)} tasks"]
    for agent in results.agents:
        groups = [results.of(task, agent) for task in tasks]
        greedy = [np.mean([record.greedy.mean_return for record in group]) for group in groups if group]
        sampled = [np.mean([record.sampled.mean_return for record in group]) for group in groups if group]
        whole = len(greedy) == len(tasks)
        row.append(f"{number(float(np.mean(greedy)))} / {number(float(np.mean(sampled)))}" if whole else "-")
    published = [float(np.mean([results.published[task][name] for task in tasks])) for name in columns]
    return [[*row, "-", *map(number, published)]]


def number(value: float) -> str:
    """A return with three digits after the point, or fewer where it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def spell(value: Estimate | None, digits: int = 2) -> str:
    """A figure with its interval if it has one, such as "0.93 [0.90, 0.97]"."""
    if value is None:
        return "-"
    if math.isnan(value.low):
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def common_scores(
    results: Results, agent: str, other_results: Results, other: str, tasks: Sequence[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Final scores of two agents on the tasks and seeds that both have, paired."""
    before, after = [], []
    for task in tasks:
        one = {record.seed: record.greedy.score for record in results.of(task, agent)}
        two = {record.seed: record.greedy.score for record in other_results.of(task, other)}
        seeds = sorted(one.keys() & two.keys())
        if seeds:
            before.append(np.array([one[seed] for seed in seeds]))
            after.append(np.array([two[seed] for seed in seeds]))
    return before, after


def _state_of(results: Results, checks: Sequence[Check]) -> str:
    planned = len(results.records) + len(results.failures) + len(results.missing)
    broken, unknown = (sum(item.answer == word for item in checks) for word in ("no", "not known"))
    all_have_all = planned == len(results.tasks) * len(results.agents) * len(results.seeds)
    fewer = "" if all_have_all else "up to "
    verdict = f"{len(checks) - broken - unknown} of the {len(checks)} checks below hold"
    do = "does" if broken == 1 else "do"
    verdict += (f", {broken} {do} not" if broken else "") + (f", {unknown} cannot be told" if unknown else "")
    return (
        f"{len(results.records)} of {planned} runs: {len(results.tasks)} tasks, {len(results.agents)} agents, "
        f"{fewer}{len(results.seeds)} seeds each; {verdict}. A score of 0 is the best policy without memory, 1 the "
        "optimum; figures are interquartile means of the final weights, played greedily, with bootstrap 95 % intervals."
    )


def _overall(results: Results) -> Table:
    first = results.agents[0]
    columns = [
        *("agent", "score", "solved runs", f"{first} is better", "sampled actions", "CPU min per run", "tuning runs")
    ]
    rows = []
    for agent in results.agents:
        records = [record for record in results.records if record.agent == agent]
        if not records:
            rows.append([agent, *["-"] * (len(columns) - 1)])
            continue
        solved = sum(record.greedy.score >= results.solved_score for record in records)
        low, high = wilson_interval(solved, len(records))
        pair = common_scores(results, agent, results, first, results.tasks)
        better = None if agent == first or not pair[0] else probability_of_improvement(*pair)
        rows.append(
            [
                agent,
                _score(results, agent, results.tasks),
                f"{solved} of {len(records)} [{low:.2f}, {high:.2f}]",
                spell(better),
                f"{estimate(results.scores(agent, sampled=True)).value:.2f}",
                f"{np.mean([record.cpu_minutes for record in records]):.1f}",
                str(max(record.tuning_runs for record in records)),
            ]
        )
    return Table(columns, rows)


def _score(results: Results, agent: str, tasks: Sequence[str]) -> str:
    """Over tasks, with a mark if the agent lacks some, for then it is no score of the same tasks."""
    scores = results.scores(agent, tasks)
    share = results.share_of_tasks(agent, tasks)
    return spell(estimate(scores) if scores else None) + (f" ({share})" if share else "")


def _legend(results: Results) -> str:
    stop = ""
    if results.stop_score is not None:
        stop = f" Training ended once evaluations stayed at {results.stop_score}, but in tasks trained to the end."
    return (
        f"Solved: runs with a score of {results.solved_score} or more. Steps: median over the runs that got there of "
        f"the first evaluation that reached {results.solved_score}. Worst: lowest of the last five evaluations of "
        "training, interquartile mean over seeds. 4x, 16x: episodes so many times longer than in training, or (r) so "
        f"many in a row, the memory carried all along. Emptied: the memory emptied at every step.{stop}"
    )


def _tasks(results: Results) -> Table:
    columns = [
        *("ability", "task", "agent", "memory", "score", "solved", "steps", "worst", "4x", "16x", "emptied"),
        *("parameters", "state bytes", "CPU min"),
    ]
    rows = []
    for ability, tasks in results.abilities().items():
        for task in tasks:
            rows.append(_oracle_row(ability, task, [r for r in results.records if r.task == task], len(columns)))
            for agent in results.agents:
                group = results.of(task, agent)
                if group:
                    rows.append([ability, task, agent, *_task_row(group, results.solved_score)])
    return Table(columns, rows, text_columns=4)


def _oracle_row(ability: str, task: str, records: Sequence[Record], width: int) -> list[str]:
    scores = [record.oracle.score for record in records if record.oracle is not None]
    row = [ability, task, "oracle", "", f"{np.mean(scores):.2f}" if scores else "none scripted"]
    return row + ["-"] * (width - len(row))


def _task_row(group: Sequence[Record], solved_score: float) -> list[str]:
    solved = sum(record.greedy.score >= solved_score for record in group)
    steps = [step for record in group if (step := record.steps_to(solved_score)) is not None]
    return [
        group[0].memory,
        spell(estimate([np.array([record.greedy.score for record in group])])),
        f"{solved} of {len(group)}",
        f"{np.median(steps):,.0f} ({len(steps)})" if steps else "-",
        _middle(record.worst_of_last_five for record in group),
        *(_of_longer([record for record in group if key in record.longer], key, len(group)) for key in ("4", "16")),
        _middle(record.emptied.score for record in group),
        f"{group[0].parameters:,}",
        f"{group[0].state.bytes_last:,}",
        f"{np.mean([record.cpu_minutes for record in group]):.1f}",
    ]


def _of_longer(measured: Sequence[Record], key: str, runs: int) -> str:
    notes = ["r"] * any(record.in_a_row for record in measured)
    if 0 < len(measured) < runs:
        notes.append(f"{len(measured)} of {runs}")
    return _middle(record.longer[key].score for record in measured) + (f" ({', '.join(notes)})" if notes else "")


def _middle(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{interquartile_mean(np.array(known)):.2f}" if known else "-"


def _abilities(results: Results) -> Table:
    rows = []
    for ability, tasks in results.abilities().items():
        rows.append([ability, ", ".join(tasks), *(_score(results, agent, tasks) for agent in results.agents)])
    return Table(["ability", "tasks", *results.agents], rows, text_columns=2)


def _checks(checks: Sequence[Check]) -> Table:
    return Table(["what must hold", "holds"], [[item.question, item.answer] for item in checks], text_columns=2)


def _notes(checks: Sequence[Check]) -> list[str]:
    return [
        f"{item.question}: " + "; ".join([*item.problems, *item.unknown]) + "."
        for item in checks
        if item.problems or item.unknown
    ]


def _failures(results: Results) -> list[Section]:
    if not results.failures:
        return []
    parts: list[str | Table | Picture | Code] = []
    for name, reason in results.failures.items():
        parts += [name, Code("\n".join(reason.splitlines()[-FAILURE_LINES:]))]
    return [Section("Runs that failed", parts)]


def _making(results: Results) -> list[str | Table | Picture | Code]:
    counts = sorted({record.greedy.episodes for record in results.records})
    episodes = f"{' or '.join(map(str, counts))} episodes for a score"
    long = next((figure.episodes for record in results.records for figure in record.longer.values()), None)
    versions = {tuple(sorted((k, str(v)) for k, v in record.versions.items())) for record in results.records}
    said = "; or ".join(", ".join(f"{key} {value}" for key, value in version) for version in sorted(versions))
    return [
        f"Seeds {', '.join(map(str, results.seeds))}; {episodes}"
        + (f", {long} at each other length." if long else "."),
        *(f"{agent} has as many memory parameters as {other}." for agent, other in results.parameters_of.items()),
        f"Made with {said}.",
    ]
