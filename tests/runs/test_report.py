"""Returns file, curve, table and live view."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from xlstm_rl.configs import load
from xlstm_rl.runs.curve import plot_curve
from xlstm_rl.runs.live import LiveView, SignOfLife
from xlstm_rl.runs.returns import Returns, Row, read_returns
from xlstm_rl.runs.scores import (
    EMPTIED,
    MEMORYLESS,
    OPTIMUM,
    RANDOM,
    SAMPLED,
    TRAINED,
    Score,
    remarks,
    score_table,
)

TRAIN = Row("train", 2048, 1.5, 100, 0.25, 0.5)
EVAL = Row("eval", 2048, 1.75, 32, 0.5, None)


def printed(scores: list[Score]) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(score_table(scores, "title"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_returns_are_read_back_as_written(tmp_path: Path) -> None:
    returns = Returns(tmp_path / "returns.csv")
    returns.add(TRAIN)
    returns.add(EVAL)
    assert read_returns(tmp_path / "returns.csv") == [TRAIN, EVAL]


def test_rows_are_given_by_kind(tmp_path: Path) -> None:
    returns = Returns(tmp_path / "returns.csv")
    returns.add(TRAIN)
    returns.add(EVAL)
    assert returns.of("eval") == [EVAL]


@pytest.mark.parametrize("rows", [[TRAIN], [EVAL], [TRAIN, EVAL]])
def test_curve_is_a_png_and_leaves_no_partial_file(rows: list[Row], tmp_path: Path) -> None:
    plot_curve(rows, tmp_path / "curve.png", "title", {"optimum": 1.0, "best without memory": 0.5})
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_table_leaves_out_success_where_nobody_knows_it() -> None:
    assert "success" not in printed([Score("trained agent", 1.0, 0.1, None, 10)])


def test_table_shows_success_where_it_is_known() -> None:
    text = printed([Score("trained agent", 0.97, 0.017, 0.97, 100), Score("optimum", 1.0)])
    assert "0.97 ± 0.017" in text
    assert "success" in text


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (-1283.4, 233.0, "-1,283 ± 233"),
        (-1_234_567.8, 12_345.6, "-1,234,568 ± 12,346"),
        (475.3, 99.6, "475 ± 100"),
        (99.5, 9.96, "99.50 ± 10.0"),
        (0.5, 0.00002, "0.50 ± 0.000020"),
        (0.5, 1e-12, "0.50 ± 0.000000"),
        (1.0, 0.0, "1.00 ± 0"),
        (float("nan"), float("nan"), "nan ± nan"),
    ],
)
def test_table_writes_numbers_without_exponents(mean: float, error: float, expected: str) -> None:
    row = printed([Score("trained agent", mean, error)]).splitlines()[-2]
    assert expected in row


def test_live_view_prints_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with LiveView(100, Console(file=stream, width=100)) as view:
        view.update(50, 0.5, 0.25)
        view.update(100, None, None)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "50 / 100 steps" in lines[0]
    assert "return 0.50" in lines[0]
    assert "success 0.25" in lines[0]
    assert "steps/s" in lines[0]
    assert "left" in lines[0]


def test_live_view_updates_one_line_on_a_terminal() -> None:
    stream = io.StringIO()
    with LiveView(100, Console(file=stream, width=100, force_terminal=True)) as view:
        view.update(50, 0.5, 0.25)
    assert "50%" in stream.getvalue()
    assert "return 0.50" in stream.getvalue()


def table(trained: float, sampled: float, emptied: float, random: float, **facts: float) -> list[Score]:
    played = {TRAINED: trained, SAMPLED: sampled, EMPTIED: emptied, RANDOM: random}
    known = [Score(agent, facts[name]) for agent, name in ((MEMORYLESS, "memoryless"), (OPTIMUM, "optimum")) if facts]
    return [*(Score(agent, mean, 0.05, mean, 100) for agent, mean in played.items()), *known]


TMAZE = {"memoryless": 0.5, "optimum": 1.0}


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            table(0.0, 0.45, 0.0, 0.4, **TMAZE),
            r"not above random actions \(0.40\).*10,000 steps of the 150,000.*sampled",
        ),
        (table(0.0, 0.0, 0.0, 0.4), r"not above random actions"),
        (table(0.5, 0.5, 0.5, 0.2, **TMAZE), r"not above best without memory \(0.50\)"),
        (table(1.0, 1.0, 1.0, 0.2, memoryless=1.0, optimum=1.0), "memory gains nothing here"),
        (table(0.9, 0.9, 0.85, 0.2), "memory gains nothing here"),
        # as good as it gets, by chance too
        (table(1.0, 1.0, 1.0, 1.0, memoryless=1.0, optimum=1.0), "memory gains nothing here"),
        (table(0.9, 0.9, 0.5, 0.4, **TMAZE), "^$"),
        ([], "^$"),
        (table(0.0, 0.0, 0.0, 0.4)[:2], "^$"),
    ],
)
def test_remarks_say_what_a_table_means(scores: list[Score], said: str) -> None:
    text = " ".join(remarks(scores, load("tmaze", ["total_steps=10_000"]), 10_000))
    assert re.search(said, text), text


def test_a_memoryless_agent_is_not_told_that_its_memory_gains_nothing() -> None:
    config = load("tmaze", ["memory.name=none"])
    assert remarks(table(0.9, 0.9, 0.9, 0.4, **TMAZE), config, 10_000) == []


def test_an_evaluation_says_how_far_it_is_and_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("xlstm_rl.runs.live.time.monotonic", lambda: now[0])
    alive = SignOfLife(Console(file=stream, width=100), "the agent", 40)
    for seconds in (1.0, 2.9, 3.0, 5.0, 6.5):
        now[0] = seconds
        alive(10, 1_000)
    assert stream.getvalue().splitlines() == [
        "evaluating the agent: 10 of 40 episodes, step 1,000, at most 0:09 left",
        "evaluating the agent: 10 of 40 episodes, step 1,000, at most 0:19 left",
    ]
