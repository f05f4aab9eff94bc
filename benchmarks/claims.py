"""What the xLSTM papers report of its memories, on the kernels here: recall, state tracking, revision; supervised.

    python -m benchmarks.claims                    # all memories on all tasks, some 40 CPU minutes
    python -m benchmarks.claims --only m s --tasks parity --updates 200
    python -m benchmarks.claims --render           # the table and the figure again, nothing is run

The tasks are those of Beck et al. 2024, made small: associative recall of many pairs (MQAR, Arora et al. 2023), regular
languages at eight times the training length, and the search of the nearest vector so far, where a better one revises
what was stored. All memories have as many parameters, one linear layer before (their own) and one after, the same
optimiser and the same data. A finished training leaves a line in `benchmarks/results/claims.jsonl` and is not done
again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xlstm_rl.memory import make_memory

RESULTS = Path(__file__).parent / "results" / "claims.jsonl"
FIGURE = Path(__file__).parents[1] / "docs" / "claims.png"
PARAMETERS = 40_000
BATCH, TEST_BATCH = 32, 256
LONGER = 8

MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {"forget_bias": 3.0}),
    "s": ("xlstm", {"blocks": "s"}),
    "m": ("xlstm", {"blocks": "m"}),
    "sm": ("xlstm", {"blocks": "sm"}),
    "transformer": ("transformer", {"window": 128}),
    "ssm": ("ssm", {}),
    "rwkv": ("rwkv", {}),
}


class Batch(NamedTuple):
    """Sequences with what is to be said.

    Attributes:
        x: [B, T, F] float32.
        target: [B, T], int64 classes or float32 values.
        asked: bool [B, T], where the answer counts.
    """

    x: Tensor
    target: Tensor
    asked: Tensor


class Supervised(NamedTuple):
    """A task.

    Attributes:
        draw: (generator, batch size, times the training length) -> batch.
        outputs: classes, or 0 for a number.
        chance: accuracy of the best answer that remembers nothing.
        lengths: times the training length, at which it is tested.
    """

    draw: Callable[[np.random.Generator, int, int], Batch]
    outputs: int
    chance: float
    lengths: tuple[int, ...]


def recall(pairs: int, symbols: int = 64) -> Supervised:
    """Keys and values one after the other, then every key again: what was its value?"""

    def draw(rng: np.random.Generator, size: int, _: int) -> Batch:
        keys = _rows(rng, symbols, size)[:, :pairs]
        values = rng.integers(symbols, size=(size, pairs))
        order = _rows(rng, pairs, size)
        shown = np.stack((keys, symbols + values), 2).reshape(size, 2 * pairs)
        tokens = np.concatenate((shown, np.take_along_axis(keys, order, 1)), 1)
        target = np.zeros_like(tokens)
        target[:, 2 * pairs :] = np.take_along_axis(values, order, 1)
        asked = np.zeros(tokens.shape, bool)
        asked[:, 2 * pairs :] = True
        return _batch(np.eye(2 * symbols, dtype=np.float32)[tokens], target, asked)

    return Supervised(draw, symbols, 1 / symbols, (1,))


def counting(moves: tuple[int, ...], modulus: int, length: int = 40) -> Supervised:
    """Where a walker stands on a ring after each move; with moves 0 and 1 on a ring of two, the parity of bits."""

    def draw(rng: np.random.Generator, size: int, longer: int) -> Batch:
        choices = rng.integers(len(moves), size=(size, longer * length))
        target = np.cumsum(np.array(moves)[choices], 1) % modulus
        asked = np.ones(choices.shape, bool)
        # at more than the training length, only what is beyond it
        asked[:, : (longer > 1) * length] = False
        return _batch(np.eye(len(moves), dtype=np.float32)[choices], target, asked)

    return Supervised(draw, modulus, 1 / modulus, (1, LONGER))


def nearest(length: int = 48) -> Supervised:
    """The value beside that vector which is nearest, so far, to the first one."""

    def draw(rng: np.random.Generator, size: int, longer: int) -> Batch:
        steps = longer * length
        vectors = rng.random((size, steps, 2), np.float32)
        values = rng.random((size, steps), np.float32)
        distance = np.linalg.norm(vectors[:, 1:] - vectors[:, :1], axis=-1)
        nearer = distance < np.minimum.accumulate(np.pad(distance, ((0, 0), (1, 0)), constant_values=9.0), 1)[:, :-1]
        place = np.maximum.accumulate(np.where(nearer, np.arange(1, steps), 0), 1)
        target = np.pad(np.take_along_axis(values, place, 1), ((0, 0), (1, 0)))
        first = np.zeros((size, steps, 1), np.float32)
        first[:, 0] = 1.0
        values[:, 0] = 0.0
        asked = np.ones((size, steps), bool)
        asked[:, 0] = False
        return _batch(np.concatenate((vectors, values[..., None], first), 2), target.astype(np.float32), asked)

    return Supervised(draw, 0, 0.0, (1, 2))


TASKS: dict[str, Supervised] = {
    "recall of 8 pairs": recall(8),
    "recall of 32 pairs": recall(32),
    "parity": counting((0, 1), 2),
    "cycle of five": counting((-1, 0, 1), 5),
    "nearest so far": nearest(),
}


class Model(nn.Module):
    """A memory and a linear layer.

    Args:
        memory: of `MEMORIES`.
        features: per step.
        outputs: classes, or 0 for a number.
    """

    def __init__(self, memory: str, features: int, outputs: int) -> None:
        super().__init__()
        name, settings = MEMORIES[memory]
        self.memory = make_memory(name, features, match_parameters=PARAMETERS, **settings)
        self.answer = nn.Linear(self.memory.output_size, outputs or 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, F] -> [B, T, outputs], or [B, T] numbers."""
        y, _ = self.memory(x, self.memory.initial_state(len(x)))
        answer: Tensor = self.answer(y)
        return answer


def train(task: Supervised, memory: str, seed: int, updates: int, rate: float) -> dict[str, float]:
    """Scores by times the training length: 0 is chance and 1 perfect; of numbers the share of variance explained."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Model(memory, task.draw(rng, 1, 1).x.shape[-1], task.outputs)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, updates, pct_start=0.1)
    for _ in range(updates):
        loss = _loss(model, task.draw(rng, BATCH, 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    # draws of their own, the same for all memories
    return {str(longer): _score(model, task, longer, np.random.default_rng(10**6 + seed)) for longer in task.lengths}


def _loss(model: Model, batch: Batch) -> Tensor:
    answer = model(batch.x)[batch.asked]
    target = batch.target[batch.asked]
    if target.is_floating_point():
        return nn.functional.mse_loss(answer.squeeze(-1), target)
    return nn.functional.cross_entropy(answer, target)


@torch.no_grad()
def _score(model: Model, task: Supervised, longer: int, rng: np.random.Generator) -> float:
    batch = task.draw(rng, TEST_BATCH, longer)
    model.eval()
    answer, target = model(batch.x)[batch.asked], batch.target[batch.asked]
    if target.is_floating_point():
        return 1 - float((answer.squeeze(-1) - target).square().mean() / target.var())
    return (float((answer.argmax(-1) == target).float().mean()) - task.chance) / (1 - task.chance)


def _rows(rng: np.random.Generator, number: int, size: int) -> NDArray[np.int64]:
    return rng.permuted(np.tile(np.arange(number), (size, 1)), axis=1)


def _batch(*parts: NDArray[Any]) -> Batch:
    return Batch(*(torch.from_numpy(part) for part in parts))


def read() -> list[dict[str, Any]]:
    """The trainings that are done."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores as Markdown, each the mean over seeds at the better rate; in brackets that at longer sequences."""
    lines = ["| | " + " | ".join(MEMORIES) + " |", "|---|" + "---:|" * len(MEMORIES)]
    for task, what in TASKS.items():
        for longer in map(str, what.lengths):
            cells = [_cell(rows, task, memory, longer) for memory in MEMORIES]
            name = task if longer == "1" else f"{task}, {longer} x as long"
            lines.append(f"| {name} | " + " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]], task: str, memory: str, longer: str) -> float | None:
    """At the rate that is better at the training length."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if (row["task"], row["memory"]) == (task, memory):
            by_rate.setdefault(row["rate"], []).append(row["scores"])
    if not by_rate:
        return None
    best = max(by_rate.values(), key=lambda scores: np.mean([score["1"] for score in scores]))
    return float(np.mean([score[longer] for score in best]))


def draw_figure(rows: Sequence[dict[str, Any]]) -> None:
    """A panel per line of the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(task, str(longer)) for task, what in TASKS.items() for longer in what.lengths]
    figure = Figure(figsize=(2.2 * len(panels), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (task, longer) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        scores = [_cell(rows, task, memory, longer) or 0.0 for memory in MEMORIES]
        axis.bar(list(MEMORIES), scores, color=[f"C{index}" for index in range(len(MEMORIES))])
        axis.set_title(task if longer == "1" else f"{task},\n{longer} x as long", fontsize="medium")
        axis.tick_params(axis="x", rotation=90)
        axis.set_ylim(-0.05, 1.05)
        axis.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("score")
    figure.savefig(FIGURE, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEMORIES, default=list(MEMORIES), metavar="MEMORY")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--rates", nargs="+", type=float, default=[4e-3])
    parser.add_argument("--render", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wanted = [
        {"task": task, "memory": memory, "seed": seed, "rate": rate, "updates": options.updates}
        for seed in options.seeds
        for rate in options.rates
        for task in options.tasks
        for memory in options.only
    ]
    for run in [] if options.render else wanted:
        if any(run.items() <= row.items() for row in read()):
            continue
        start = time.process_time()
        scores = train(TASKS[run["task"]], run["memory"], run["seed"], run["updates"], run["rate"])
        row = {**run, "scores": scores, "cpu_seconds": round(time.process_time() - start, 1)}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    rows = read()
    if rows:
        draw_figure(rows)
        print(table(rows))


if __name__ == "__main__":
    main()
