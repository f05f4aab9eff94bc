"""The returns of a run as a CSV file that can be read while the run goes on."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from xlstm_rl.agents.checkpoint import flush_file, write_whole

Kind = Literal["train", "eval"]


class Row(NamedTuple):
    """Episodes that ended since the last row of the kind.

    Attributes:
        kind: "train" while exploring, "eval" deterministic on fresh environments.
        step: environment steps trained so far.
        seconds: since the start of training.
        episodes: how many ended.
        mean_return: their mean return.
        success: share of successes, None where the task does not say.
    """

    kind: Kind
    step: int
    seconds: float
    episodes: int
    mean_return: float
    success: float | None


class Returns:
    """Writes rows to a CSV file, each at once, and keeps them.

    Args:
        path: of the file; written anew. None for ranks that write none.
        kept: rows to begin with.
        seconds: of training so far.
    """

    def __init__(self, path: Path | None, kept: Sequence[Row] = (), seconds: float = 0.0) -> None:
        self._path = path
        self._started = time.monotonic() - seconds
        self.rows = list(kept)
        if path is None:
            return
        text = io.StringIO(newline="")
        csv.writer(text).writerow(Row._fields)
        csv.writer(text).writerows(map(_cells, self.rows))
        write_whole(path, text.getvalue().encode())

    def seconds(self) -> float:
        """Since the start of training, interruptions left out."""
        return round(time.monotonic() - self._started, 2)

    def add(self, row: Row) -> None:
        """Append a row to the file."""
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(_cells(row))

    def of(self, kind: Kind) -> list[Row]:
        """The rows of one kind, oldest first."""
        return [row for row in self.rows if row.kind == kind]

    def flush(self) -> None:
        """Put all rows on the disk."""
        if self._path is not None:
            flush_file(self._path)


def _cells(row: Row) -> list[Any]:
    return ["" if value is None else value for value in row]


def read_returns(path: Path) -> list[Row]:
    """The rows of a file that `Returns` writes or wrote, up to the first one that is torn; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    head, *lines = text.splitlines(keepends=True) or [""]
    # without its end a line may be half a number
    for line in lines if head.strip() == ",".join(Row._fields) else []:
        cells = line.rstrip("\r\n").split(",")
        try:
            kind, step, seconds, episodes, mean_return, success = cells
            if not line.endswith("\n") or kind not in ("train", "eval"):
                break
            numbers = float(seconds), int(episodes), float(mean_return), float(success) if success else None
            rows.append(Row("eval" if kind == "eval" else "train", int(step), *numbers))
        except ValueError:
            break
    return rows


def pack_rows(rows: Sequence[Row]) -> np.ndarray:
    """Rows as numbers [n, 6] for a checkpoint, every number exact."""
    numbers = [(row.kind == "eval", *row[1:5], np.nan if row.success is None else row.success) for row in rows]
    return np.array(numbers, np.float64).reshape(-1, len(Row._fields))


def unpack_rows(numbers: np.ndarray) -> list[Row]:
    """The inverse of `pack_rows`.

    Raises:
        ValueError: these are no rows.
    """
    if numbers.ndim != 2 or numbers.shape[1] != len(Row._fields) or not np.isfinite(numbers[:, :4]).all():
        raise ValueError(f"an array of shape {numbers.shape} holds no rows of returns")
    return [
        Row(
            "eval" if kind else "train", int(step), seconds, int(episodes), mean, None if np.isnan(success) else success
        )
        for kind, step, seconds, episodes, mean, success in numbers.tolist()
    ]
