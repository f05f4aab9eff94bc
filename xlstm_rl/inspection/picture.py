"""An episode as one picture: what was seen, done and expected, and what every block of the memory kept and read."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.inspection.episode import Episode
from xlstm_rl.inspection.reads import horizons, input_gates, read_weights
from xlstm_rl.kernels import KernelCall, MLSTMCall

# Rows of a heat map with names of their own; more are numbered by the axis.
LABELLED_ROWS = 12
LONGEST_HORIZON = 1000.0
# Of the text at the top right, in units of a panel of the left column.
FACTS_HEIGHT = 1.3
DARK, ACCENT, SECOND = "#1b2a41", "#d1495b", "#2a7f9e"


def draw_episode(episode: Episode, path: Path, title: str, *, gamma: float) -> None:
    """Draw an episode.

    Args:
        episode: as recorded.
        path: the PNG to write; replaced whole.
        title: above the picture.
        gamma: discount factor per step, for the return that the values are compared with.
    """
    # Loaded here because most uses of the package never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = len(episode.blocks)
    heights = [1.0, 1.0, 1.0] + ([1.0, 1.0, 0.9] * blocks or [1.2])
    figure = Figure(figsize=(13, 0.6 + 1.45 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(1.7, 1.0), height_ratios=heights)
    left = _time_axes(figure, grid, len(heights))
    rest = [(sum(heights) - FACTS_HEIGHT) / max(blocks, 1)] * blocks
    right = grid[:, 1].subgridspec(1 + blocks, 1, height_ratios=[FACTS_HEIGHT, *rest])
    _observations(left[0], episode)
    _actions(left[1], episode)
    _values(left[2], episode, gamma)
    _facts(figure.add_subplot(right[0]), episode)
    for index, call in enumerate(episode.blocks):
        first = 3 + 3 * index
        _gates(left[first], left[first + 1], call, index)
        _norms(left[first + 2], {f"block {index}": episode.state_norms[f"block {index}"]}, call)
        _reads(figure, right[1 + index], call, index)
    if not blocks:
        _norms(left[3], episode.state_norms, None)
    left[-1].set_xlabel("step of the episode")
    figure.suptitle(title, fontsize="x-large", color=DARK, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def _time_axes(figure: Any, grid: Any, count: int) -> list[Any]:
    """The panels of the left column, over one time axis."""
    axes: list[Any] = []
    for row in range(count):
        panel = figure.add_subplot(grid[row, 0], sharex=axes[0] if axes else None)
        panel.tick_params(labelbottom=row == count - 1)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        axes.append(panel)
    _whole_numbers(axes[0].xaxis)
    return axes


def _heat(panel: Any, rows: np.ndarray, label: str, **style: Any) -> None:
    """Rows [n, T] as a heat map with a colour bar."""
    count, steps = rows.shape
    extent = (-0.5, steps - 0.5, count - 0.5, -0.5)
    image = panel.imshow(rows, aspect="auto", interpolation="nearest", extent=extent, **style)
    panel.figure.colorbar(image, ax=panel, pad=0.01, label=label, fraction=0.05)


def _name_rows(panel: Any, names: list[str], axis: str) -> None:
    if len(names) <= LABELLED_ROWS:
        panel.set_yticks(range(len(names)), names, fontsize="small")
    else:
        panel.set_yticks([])
    panel.set_ylabel(axis)


def _observations(panel: Any, episode: Episode) -> None:
    panel.set_title("What the agent saw", loc="left", color=DARK)
    if not episode.labels:
        panel.text(0.5, 0.5, "images only", ha="center", va="center", transform=panel.transAxes)
        panel.set_yticks([])
        return
    rows = episode.observations.T
    largest = max(float(np.abs(rows).max()), 1e-12)
    style = (
        {"cmap": "Greys", "vmin": 0.0, "vmax": largest}
        if rows.min() >= 0
        else {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    )
    _heat(panel, rows, "value", **style)
    _name_rows(panel, episode.labels, "observation")


def _actions(panel: Any, episode: Episode) -> None:
    steps = np.arange(len(episode.actions))
    if episode.choices is None:
        panel.set_title("What it did", loc="left", color=DARK)
        for index, part in enumerate(episode.actions.T):
            panel.step(steps, part, where="mid", label=f"action {index}", linewidth=1.4)
        _legend(panel)
        panel.set_ylabel("action")
        return
    panel.set_title("What it did: probability of every choice; dots: taken", loc="left", color=DARK)
    _heat(panel, episode.choices.T, "probability", cmap="Blues", vmin=0.0, vmax=1.0)
    one = episode.actions.shape[1] == 1
    first = int(episode.starts[0]) if one else 0
    _name_rows(panel, [str(first + index) for index in range(episode.choices.shape[1])], "choice")
    if one:
        rows = episode.actions[:, 0] - first
        panel.plot(steps, rows, "o", color=ACCENT, markersize=4 if len(steps) <= 60 else 1.5)


def _values(panel: Any, episode: Episode, gamma: float) -> None:
    panel.set_title("What it expected and what it got", loc="left", color=DARK)
    steps = np.arange(len(episode.values))
    panel.plot(steps, episode.values, color=DARK, linewidth=1.8, label="value")
    if episode.ended != "cut":
        panel.plot(
            steps,
            _returns(episode.rewards, gamma),
            "--",
            color=SECOND,
            linewidth=1.4,
            label="discounted return that followed",
        )
    panel.bar(steps, episode.rewards, color=ACCENT, alpha=0.45, width=0.8, label="reward")
    panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    _legend(panel)
    panel.set_ylabel("reward")


def _returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    total, found = 0.0, []
    for reward in rewards[::-1]:
        total = float(reward) + gamma * total
        found.append(total)
    return np.array(found[::-1])


def _gates(forget: Any, write: Any, call: KernelCall, index: int) -> None:
    from matplotlib.colors import LogNorm

    matrix = isinstance(call, MLSTMCall)
    kind, rows = ("mLSTM", "head") if matrix else ("sLSTM", "unit")
    keep, written = horizons(call), input_gates(call)
    if not matrix:
        # units that keep for long on top
        order = np.argsort(-np.log(keep).mean(1))
        keep, written = keep[order], written[order]
    forget.set_title(f"Block {index} ({kind}): how long it keeps, -1 / log(forget gate)", loc="left", color=DARK)
    _heat(forget, keep.clip(1.0, LONGEST_HORIZON), "steps", cmap="viridis", norm=LogNorm(1.0, LONGEST_HORIZON))
    write.set_title(f"Block {index}: how strongly it writes, log of the input gate", loc="left", color=DARK)
    largest = max(float(np.abs(written).max()), 1e-12)
    _heat(write, written, "log gate", cmap="RdBu_r", vmin=-largest, vmax=largest)
    for panel in (forget, write):
        _name_rows(panel, [str(row) for row in range(len(keep))], rows)


def _norms(panel: Any, norms: dict[str, np.ndarray], call: KernelCall | None) -> None:
    titles = {
        MLSTMCall: ("size of the matrix memory", "log10 of its norm"),
        type(None): ("Size of the memory state", "root mean square"),
    }
    title, unit = titles.get(type(call), ("size of the content", "root mean square"))
    for name, values in norms.items():
        panel.set_title(title if call is None else f"{name.capitalize()}: {title}", loc="left", color=DARK)
        for index, line in enumerate(values.T):
            label = name if call is None else f"head {index}"
            panel.plot(np.arange(len(line)), line, linewidth=1.4, label=label)
    _legend(panel)
    panel.set_ylabel(unit)


def _reads(figure: Any, place: Any, call: KernelCall, index: int) -> None:
    """Share of every past step in the read of the present one, head by head."""
    from matplotlib.colors import PowerNorm

    weights = np.abs(read_weights(call))
    shares = weights / weights.sum(-1, keepdims=True).clip(1e-12)  # [H, T, T]
    heads, steps = shares.shape[:2]
    shares[:, ~np.tri(steps, dtype=bool)] = np.nan
    columns = math.ceil(heads**0.5)
    panels = place.subgridspec(math.ceil(heads / columns), columns).subplots(squeeze=False, sharex=True, sharey=True)
    # what is read evenly from hundreds of steps should still show
    scale = PowerNorm(1.0 if steps <= 60 else 0.4, 0.0, 1.0)
    image = None
    for number, panel in enumerate(panels.flat):
        if number >= heads:
            panel.axis("off")
            continue
        image = panel.imshow(shares[number], cmap="magma_r", norm=scale, interpolation="nearest", aspect="auto")
        panel.set_title(f"Block {index}, head {number}", fontsize="medium", loc="left", color=DARK)
        _whole_numbers(panel.xaxis, panel.yaxis, most=4)
    for panel in panels[-1]:
        panel.set_xlabel("written at step")
    for panel in panels[:, 0]:
        panel.set_ylabel("read at step")
    figure.colorbar(image, ax=panels, pad=0.02, label="share of what is read", fraction=0.04)


def _whole_numbers(*axes: Any, most: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=most, integer=True))


def _legend(panel: Any) -> None:
    """Above the panel, beside its title, if there is anything to name."""
    if not panel.get_legend_handles_labels()[0]:
        return
    panel.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, frameon=False)


def _facts(panel: Any, episode: Episode) -> None:
    panel.axis("off")
    ends = {"terminated": "ended", "truncated": "cut by the time limit", "cut": "cut here"}
    lines = [f"{len(episode.rewards)} steps, {ends[episode.ended]}, return {episode.total:.2f}"]
    if episode.blocks:
        lines += [
            "",
            "Triangles: where the memory's output comes from.",
            "A row is the step that reads, its columns are the",
            "steps whose inputs it reads, by their share; gates,",
            "decay, keys and queries are all in it.",
        ]
    text = "\n".join(lines)
    panel.text(0.0, 0.95, text, va="top", transform=panel.transAxes, color=DARK, linespacing=1.5)
