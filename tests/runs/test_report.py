"""Returns file, curve, table and live view."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from xlstm_rl.runs.curve import plot_curve
from xlstm_rl.runs.live import LiveView
from xlstm_rl.runs.returns import Returns, Row, read_returns
from xlstm_rl.runs.scores import Score, score_table

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
