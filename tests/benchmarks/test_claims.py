"""The supervised tasks ask for what they say, and memories are trained and compared on equal terms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import claims
from benchmarks.claims import MEMORIES, PARAMETERS, TASKS, Model, main, train


def test_recall_asks_for_the_value_of_each_key_once() -> None:
    batch = TASKS["recall of 8 pairs"].draw(np.random.default_rng(0), 4, 1)
    tokens = batch.x.argmax(-1)
    for row, target, asked in zip(tokens.tolist(), batch.target.tolist(), batch.asked.tolist(), strict=True):
        value = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(value) == 8
        assert asked == [False] * 16 + [True] * 8
        assert sorted(row[16:]) == sorted(value)
        assert [64 + answer for answer in target[16:]] == [value[key] for key in row[16:]]


@pytest.mark.parametrize(("name", "moves", "modulus"), [("parity", (0, 1), 2), ("cycle of five", (-1, 0, 1), 5)])
def test_walker_is_where_its_moves_lead(name: str, moves: tuple[int, ...], modulus: int) -> None:
    task = TASKS[name]
    for longer in task.lengths:
        batch = task.draw(np.random.default_rng(0), 2, longer)
        for row, target in zip(batch.x.argmax(-1).tolist(), batch.target.tolist(), strict=True):
            assert target == [sum(moves[move] for move in row[: t + 1]) % modulus for t in range(len(row))]
        # at greater length only what lies beyond that of training
        assert int(batch.asked[0].sum()) == (40 if longer == 1 else 40 * longer - 40)


def test_nearest_is_revised_by_nearer_vectors_alone() -> None:
    batch = TASKS["nearest so far"].draw(np.random.default_rng(0), 3, 1)
    for x, target in zip(batch.x.tolist(), batch.target.tolist(), strict=True):
        for t in range(1, len(x)):
            best = min(range(1, t + 1), key=lambda at: (x[at][0] - x[0][0]) ** 2 + (x[at][1] - x[0][1]) ** 2)
            assert target[t] == x[best][2]
    assert not batch.asked[:, 0].any()


@pytest.mark.parametrize("memory", MEMORIES)
def test_memories_have_equal_sizes(memory: str) -> None:
    count = sum(part.numel() for part in Model(memory, 128, 64).memory.parameters())
    assert abs(count / PARAMETERS - 1) < 0.06


def test_training_learns_what_the_memory_can_and_depends_on_nothing_else() -> None:
    first, again = (train(TASKS["parity"], "s", seed=3, updates=150, rate=1e-2) for _ in range(2))
    assert first == again
    assert first["1"] > 0.9
    torch.manual_seed(0)
    assert train(TASKS["parity"], "transformer", seed=3, updates=20, rate=4e-3)["1"] < 0.3


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.jsonl")
    monkeypatch.setattr(claims, "FIGURE", tmp_path / "claims.png")
    arguments = ["--only", "s", "--tasks", "parity", "--updates", "20", "--rates", "0.001", "0.004"]
    main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]
    assert [row["rate"] for row in rows] == [0.001, 0.004]
    main(arguments)
    assert len((tmp_path / "claims.jsonl").read_text().splitlines()) == 2
    best = max(row["scores"]["1"] for row in rows)
    assert f"| parity | - | {best:.2f} | - |" in capsys.readouterr().out
    assert (tmp_path / "claims.png").is_file()
