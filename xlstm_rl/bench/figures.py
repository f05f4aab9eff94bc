"""The figures of a report card."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_rl.bench.results import Record, Results
from xlstm_rl.bench.statistics import estimate, performance_profile

COLUMNS = 4
Array = NDArray[np.float64]


def draw_all(results: Results, folder: Path) -> None:
    """Write curves.png, and what else the benchmark's kind of score allows, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = [task for task in results.tasks if any(record.task == task for record in results.records)]
    _panels(results, begun, _draw_curves, folder / "curves.png", ("environment steps", results.score_label))
    if results.published:
        _draw_published(results, folder / "published.png")
    if results.score == "return":
        return
    with_lengths = [task for task in results.tasks if any(r.longer for r in results.records if r.task == task)]
    in_a_row = {record.task: f"{record.task} (r)" for record in results.records if record.in_a_row}
    _panels(
        results, with_lengths, _draw_lengths, folder / "lengths.png", ("times the training length", "score"), in_a_row
    )
    _draw_abilities(results, folder / "abilities.png")
    _draw_profiles(results, folder / "profiles.png")


def _labels(results: Results) -> dict[str, str]:
    """Names of the agents, with their number of tasks where they lack some, and of seeds where others have more."""
    seeds = {agent: max(map(len, results.scores(agent)), default=0) for agent in results.agents}
    most = max(seeds.values())
    labels = {}
    for agent, count in seeds.items():
        notes = [results.share_of_tasks(agent), None if count in (0, most) else f"{count} seed{'s' * (count > 1)}"]
        said = ", ".join(note for note in notes if note)
        labels[agent] = f"{agent} ({said})" if said else agent
    return labels


def _figure(width: float, height: float) -> Any:
    # Loaded here because only cards need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", dpi=110)


def _panels(
    results: Results,
    tasks: Sequence[str],
    draw: Callable[[Any, Sequence[Record], str, str], None],
    path: Path,
    labels: tuple[str, str],
    titles: Mapping[str, str] | None = None,
) -> None:
    """A panel per task, titled by its name or by `titles`, in which `draw` adds each agent."""
    columns = min(COLUMNS, max(len(tasks), 1))
    rows = max(-(-len(tasks) // columns), 1)
    figure = _figure(3.4 * columns, 2.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    names = _labels(results)
    for panel, task in zip(panels, tasks, strict=False):
        for index, agent in enumerate(results.agents):
            group = results.of(task, agent)
            if group:
                draw(panel, group, names[agent], f"C{index}")
        for height, style in ((0.0, ":"), (1.0, "--")) if results.score == "memory" else ():
            panel.axhline(height, color="0.4", linestyle=style, linewidth=1)
        panel.set_title((titles or {}).get(task, task), fontsize="medium")
        panel.set_xlabel(labels[0])
        panel.grid(alpha=0.3)
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    if tasks:
        panels[0].set_ylabel(labels[1])
        # not every agent is in every panel
        lines = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        known = [name for name in names.values() if name in lines]
        if known:
            shown = [lines[name] for name in known]
            figure.legend(shown, known, fontsize="small", loc="outside upper center", ncols=min(len(known), 5))
    else:
        figure.suptitle("no task has such figures", fontsize="medium")
    _save(figure, path)


def _draw_curves(panel: Any, group: Sequence[Record], label: str, colour: str) -> None:
    from matplotlib.ticker import EngFormatter

    curves = [np.array(record.curve_scores) for record in group if record.curve]
    if not curves:
        return
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    # a run that ended early keeps the score that it ended with
    held = np.stack([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves], axis=1)  # [steps, seeds]
    band = np.array([estimate([scores]) for scores in held])
    panel.plot(steps, band[:, 0], color=colour, label=label, linewidth=1.5)
    panel.fill_between(steps, band[:, 1], band[:, 2], color=colour, alpha=0.2, linewidth=0)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_lengths(panel: Any, group: Sequence[Record], label: str, colour: str) -> None:
    lengths = sorted({int(key) for record in group for key in record.longer})
    group = [record for record in group if record.longer]
    scores = [np.array([record.greedy.score for record in group])]
    scores += [np.array([r.longer[str(key)].score for r in group if str(key) in r.longer]) for key in lengths]
    band = np.array([estimate([values]) for values in scores])
    ticks = [1, *lengths]
    panel.plot(ticks, band[:, 0], color=colour, label=label, marker="o", markersize=3, linewidth=1.5)
    panel.fill_between(ticks, band[:, 1], band[:, 2], color=colour, alpha=0.2, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])


def _draw_published(results: Results, path: Path) -> None:
    """A row per task with published figures: a mark for each agent, of greedy weights, and for each of the columns."""
    tasks = [
        task for task in results.tasks if task in results.published and any(r.task == task for r in results.records)
    ]
    figure = _figure(7.5, 1.5 + 0.3 * len(tasks))
    panel, places = figure.subplots(), range(len(tasks))
    for index, (agent, name) in enumerate(_labels(results).items()):
        groups = [[record.greedy.mean_return for record in results.of(task, agent)] for task in tasks]
        marks = [(float(np.mean(group)), place) for group, place in zip(groups, places, strict=True) if group]
        if marks:
            panel.plot(
                *zip(*marks, strict=True), "o", color=f"C{index}", label=name, markersize=6, zorder=3 - index / 10
            )
    columns = dict.fromkeys(name for task in tasks for name in results.published[task])
    for column, mark in zip(columns, itertools.cycle("|x+d1^"), strict=False):
        marks = [
            (results.published[task][column], place)
            for place, task in enumerate(tasks)
            if column in results.published[task]
        ]
        panel.plot(*zip(*marks, strict=True), mark, color="0.25", label=column, markersize=8)
    panel.set_yticks(places, tasks, fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel("mean return")
    panel.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside upper center", ncols=4)
    _save(figure, path)


def _draw_abilities(results: Results, path: Path) -> None:
    abilities = results.abilities()
    figure = _figure(max(1.6 * len(abilities) + 2, 5), 4.0)
    panel = figure.subplots()
    # an agent without runs keeps its colour free, but no room and no name
    drawn = [(index, agent) for index, agent in enumerate(results.agents) if results.scores(agent)]
    width, names = 0.8 / max(len(drawn), 1), _labels(results)
    for column, (index, agent) in enumerate(drawn):
        places, bars = [], []
        for place, tasks in enumerate(abilities.values()):
            scores = results.scores(agent, tasks)
            if scores:
                places.append(place + (column - (len(drawn) - 1) / 2) * width)
                bars.append(estimate(scores))
        values = np.array(bars).reshape(-1, 3)
        # rounding can put the value a hair outside its interval
        errors = np.maximum([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]], 0)
        panel.bar(
            places, values[:, 0], width, yerr=errors, label=names[agent], color=f"C{index}", error_kw={"linewidth": 1}
        )
    panel.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
    panel.set_xticks(range(len(abilities)), list(abilities), fontsize="small")
    panel.set_ylabel("score")
    # beside the bars, which reach the top
    figure.legend(fontsize="small", loc="outside upper center", ncols=min(max(len(drawn), 1), 5))
    panel.grid(alpha=0.3, axis="y")
    _save(figure, path)


def _draw_profiles(results: Results, path: Path) -> None:
    figure = _figure(5.2, 3.4)
    panel = figure.subplots()
    thresholds: Array = np.linspace(-0.1, 1.05, 93)
    names = _labels(results)
    for index, agent in enumerate(results.agents):
        scores = results.scores(agent)
        if scores:
            share, low, high = performance_profile(scores, thresholds)
            panel.plot(thresholds, share, color=f"C{index}", label=names[agent], linewidth=1.5)
            panel.fill_between(thresholds, low, high, color=f"C{index}", alpha=0.2, linewidth=0)
    panel.set_xlabel("score")
    panel.set_ylabel("share of runs above it")
    panel.legend(fontsize="x-small")
    panel.grid(alpha=0.3)
    _save(figure, path)
