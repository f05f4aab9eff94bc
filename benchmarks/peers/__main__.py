"""Recurrent PPO of several libraries, each in its own idiom: steps per CPU second, and whether resets are exact.

    pip install -r benchmarks/peers/requirements.txt
    python -m benchmarks.peers                      # CartPole and 200-step episodes, width 64
    python -m benchmarks.peers --width 128 --rounds 9 --only rsl_rl xlstm_rl

One process, one thread; a rollout of 16 x 128 steps and its update, 4 epochs in minibatches of 512 steps, in turn for
all. Gradients reach back as far everywhere: through the 128 steps of the rollout. Reported are medians over rounds of
the CPU time as a multiple of the steps that sb3-contrib makes in the same round, and the largest error of
log-probabilities that training recomputes before its first step. Libraries that are not installed are left out by name.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# before torch counts the processors
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.peers import of_cleanrl, of_sb3  # noqa: E402
from benchmarks.peers.setting import N_ENVS, N_STEPS, TASKS, Contender  # noqa: E402

Make = Callable[[str, int], Contender]
BASE = "sb3-contrib, LSTM x 2"
# By the package that has to be installed.
OPTIONAL = {"skrl": "of_skrl", "rsl_rl": "of_rsl_rl", "torchrl": "of_torchrl"}


def contenders(only: list[str]) -> dict[str, Make]:
    """What makes each contender, by label; the one that all are compared with comes first."""
    makers: dict[str, Make] = {BASE: of_sb3.contrib, "CleanRL style, LSTM x 2": of_cleanrl.make}
    for package, module in OPTIONAL.items():
        if find_spec(package) is None:
            print(f"{package} is not installed and left out: pip install -r benchmarks/peers/requirements.txt")
            continue
        makers[f"{package}, LSTM x 2"] = import_module(f"benchmarks.peers.{module}").make
    makers |= {
        "xlstm_rl, LSTM x 2": of_sb3.ours("lstm"),
        "xlstm_rl, GRU x 2": of_sb3.ours("gru"),
        'xlstm_rl, "m" shared': of_sb3.ours("xlstm", "shared", blocks="m"),
        'xlstm_rl, "s" shared': of_sb3.ours("xlstm", "shared", blocks="s"),
        "xlstm_rl, recommended": of_sb3.recommended,
        "Stable-Baselines3, no memory": of_sb3.no_memory,
    }
    return {
        label: make for label, make in makers.items() if label == BASE or any(word in label for word in only or [""])
    }


def measure(made: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Steps per CPU second of every contender in every round, after one that warms up."""
    rates: dict[str, list[float]] = {label: [] for label in made}
    for turn in range(rounds + 1):
        for label, contender in made.items():
            gc.collect()
            begun = time.process_time()
            contender.iterate()
            if turn > 0:
                rates[label].append(N_ENVS * N_STEPS / (time.process_time() - begun))
    return rates


def main() -> None:
    """Measure, print a table for every task, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="labels with one of these words")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    told: list[dict[str, Any]] = []
    for task in args.tasks:
        made = {}
        for label, make in contenders(args.only).items():
            torch.manual_seed(0)
            np.random.seed(0)
            made[label] = make(task, args.width)
        rates = measure(made, args.rounds)
        print(f"\n{task}, width {args.width}\n{'':30s} steps/s   ratio    range          error")
        for label, values in rates.items():
            ratios = sorted(own / base for own, base in zip(values, rates[BASE], strict=True))
            ratio, error = statistics.median(ratios), made[label].error()
            rate = statistics.median(values)
            print(f"{label:30s} {rate:7.0f}  {ratio:5.2f}x  {ratios[0]:5.2f} to {ratios[-1]:5.2f}  {error:9.1e}")
            row = {"label": label, "task": task, "width": args.width, "rate": rate, "ratio": ratio, "error": error}
            told.append(row)
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
