"""Draws docs/rollout.png: how a rollout becomes training sequences.

python docs/draw_rollout.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

STEPS, CHUNK, STARTS = 24, 8, ((0, 5, 17), (0, 11), (0, 3, 14, 20))
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")
INK = "#333333"


def draw_row(axes: Axes, row: int, x: float, y: float, steps: range) -> None:
    """Steps of an environment as cells, coloured by episode; a dot where an episode starts."""
    for place, step in enumerate(steps):
        episode = int(np.searchsorted(STARTS[row], step, side="right")) - 1
        cell = Rectangle((x + place, y), 1, 0.8, facecolor=COLOURS[episode], edgecolor="white", linewidth=1.5)
        axes.add_patch(cell)
        if step in STARTS[row]:
            axes.plot(x + place + 0.5, y + 0.4, "o", color="white", markersize=5)


def main() -> None:
    """Draw and save."""
    figure, axes = plt.subplots(figsize=(11, 4.6))
    for row in range(3):
        y = 2.2 - 1.1 * row
        draw_row(axes, row, 0, y, range(STEPS))
        axes.text(-0.4, y + 0.4, f"environment {row + 1}", ha="right", va="center", color=INK)
    for start in range(0, STEPS + 1, CHUNK):
        axes.plot([start, start], [-0.25, 3.2], color=INK, linewidth=1.2, linestyle="--")
    for start in range(0, STEPS, CHUNK):
        axes.plot(start, 3.45, "s", color=INK, markersize=8)
    axes.text(
        STEPS / 2, 4.0, "rollout, time goes right; squares: memory state kept", ha="center", color=INK, fontsize=11
    )
    axes.annotate("", (27.4, 1.5), (24.8, 1.5), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.5})
    axes.text(26.1, 1.75, "random\nchunks", ha="center", va="bottom", color=INK, fontsize=10)
    for place, (row, chunk) in enumerate(((1, 1), (0, 2), (2, 0))):
        y = 2.2 - 1.1 * place
        axes.plot(28.2, y + 0.4, "s", color=INK, markersize=8)
        draw_row(axes, row, 28.8, y, range(chunk * CHUNK, (chunk + 1) * CHUNK))
    axes.text(32.8, 4.0, "minibatch [B, seq_len]", ha="center", color=INK, fontsize=11)
    axes.text(
        18.2,
        -1.1,
        "One colour is one episode. A white dot is an episode start: there the memory empties itself, inside the "
        "sequence too, so nothing is padded.",
        ha="center",
        color=INK,
        fontsize=10,
    )
    axes.set_xlim(-6, 37.2)
    axes.set_ylim(-1.6, 4.6)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("rollout.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
