"""The returns of a run as a CSV file that can be read while the run goes on."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
        path: of the file; written anew.
        kept: rows to begin with.
        seconds: of training so far.
    """

    def __init__(self, path: Path, kept: Sequence[Row] = (), seconds: float = 0.0) -> None:
        self._path = path
        self._started = time.monotonic() - seconds
        self.rows = list(kept)
        partial = path.with_name(f".{path.name}.part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(Row._fields)
            csv.writer(file).writerows(map(_cells, self.rows))
        os.replace(partial, path)

    def seconds(self) -> float:
        """Since the start of training, interruptions left out."""
        return round(time.monotonic() - self._started, 2)

    def add(self, row: Row) -> None:
        """Append a row to the file."""
        self.rows.append(row)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_cells(row))

    def of(self, kind: Kind) -> list[Row]:
        """The rows of one kind, oldest first."""
        return [row for row in self.rows if row.kind == kind]


def _cells(row: Row) -> list[Any]:
    return ["" if value is None else value for value in row]


def read_returns(path: Path, count: int | None = None) -> list[Row]:
    """The rows of a file that `Returns` wrote, or the first `count` of them."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                kind="eval" if record["kind"] == "eval" else "train",
                step=int(record["step"]),
                seconds=float(record["seconds"]),
                episodes=int(record["episodes"]),
                mean_return=float(record["mean_return"]),
                success=float(record["success"]) if record["success"] else None,
            )
            for record in islice(csv.DictReader(file), count)
        ]
