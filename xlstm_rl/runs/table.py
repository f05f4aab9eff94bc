"""The closing table of a run: the trained agent between its reference points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from xlstm_rl.runs.live import printable


class Score(NamedTuple):
    """One line of the table.

    Attributes:
        agent: whom it is about.
        mean_return: over its episodes.
        standard_error: of the mean return, None where it is known exactly.
        success: share of successes, None where the task does not say.
        episodes: how many were played, None where none had to be.
        cut_episodes: how many of them did not end within `eval.max_episode_steps`.
    """

    agent: str
    mean_return: float
    standard_error: float | None = None
    success: float | None = None
    episodes: int | None = None
    cut_episodes: int = 0


def show_scores(console: Console, scores: Sequence[Score], title: str) -> None:
    """Print the scores as a table, in whatever characters the console has."""
    console.print(score_table(scores, printable(console, title), plus_minus=_plus_minus(console)))


def score_table(scores: Sequence[Score], title: str, *, plus_minus: str = "±") -> Table:
    """The scores as a rich table; the success column only where any is known."""
    show_success = any(score.success is not None for score in scores)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("agent")
    for column in ("return", *(("success",) if show_success else ()), "episodes"):
        table.add_column(column, justify="right")
    for score in scores:
        mean = f"{score.mean_return:,.0f}" if abs(score.mean_return) >= 100 else f"{score.mean_return:.2f}"
        error = "" if score.standard_error is None else f" {plus_minus} {_two_digits(score.standard_error)}"
        success = [_or_dash(score.success, ".2f")] if show_success else []
        cut = f" ({score.cut_episodes} cut)" if score.cut_episodes else ""
        table.add_row(score.agent, mean + error, *success, _or_dash(score.episodes, "d") + cut)
    return table


def _plus_minus(console: Console) -> str:
    return "±" if printable(console, "±") == "±" else "+-"


def _two_digits(value: float) -> str:
    """A number with two significant digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.2g}"
    decimals = min(max(1 - math.floor(math.log10(abs(value))), 0), 6)
    return f"{value:,.{decimals}f}"


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
