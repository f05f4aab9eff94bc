"""The learning curve of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.runs.returns import Row


def plot_curve(rows: Sequence[Row], path: Path, title: str, references: Mapping[str, float]) -> None:
    """Draw return, and success where known, over environment steps.

    Args:
        rows: of a run, training and evaluation mixed.
        path: the PNG to write; replaced whole.
        title: above the picture.
        references: returns to mark by horizontal lines, by name, such as "optimum".
    """
    # Loaded here because most uses of the package never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    success_known = any(row.success is not None for row in rows)
    figure = Figure(figsize=(5.2 * (1 + success_known), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 1 + success_known, squeeze=False)[0]
    _draw(panels[0], [(row, row.mean_return) for row in rows], "return")
    for index, (name, value) in enumerate(references.items()):
        panels[0].axhline(value, color=f"C{index + 2}", linestyle="--", linewidth=1, label=name)
    panels[0].legend(fontsize="small")
    if success_known:
        _draw(panels[1], [(row, row.success) for row in rows if row.success is not None], "success rate")
        panels[1].set_ylim(-0.03, 1.03)
    figure.suptitle(title, fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def _draw(axes: Any, points: Sequence[tuple[Row, float]], label: str) -> None:
    from matplotlib.ticker import EngFormatter

    for kind, style in (("train", {"color": "C0", "alpha": 0.5}), ("eval", {"color": "C1", "marker": "o", "ms": 3})):
        chosen = [(row.step, value) for row, value in points if row.kind == kind]
        if chosen:
            name = "training" if kind == "train" else "evaluation"
            axes.plot(*zip(*chosen, strict=True), label=name, linewidth=1.2, **style)
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
