"""The collapse of PPO on a solved sparse task, with stock advantage normalisation and with the floor.

    python -m benchmarks.collapse        # T-maze of length 10, constant learning rate, three seeds each

Stock normalisation divides every rollout's advantages by their standard deviation. After the task is solved that
deviation is the critic's error, and noise becomes full-size updates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.learning import RESULTS, Job, draw, read, render, run_all

SETTING = ("total_steps=400000", "ppo.lr_schedule=constant", "eval.every_steps=4000", "eval.n_episodes=100")
FLOORS = {"stock normalisation": "ppo.advantage_floor=0.0", "with the floor": "ppo.advantage_floor=0.1"}


def main() -> None:
    """Run what has no result yet, print the table, draw the figure, count the dips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, default=RESULTS.parent / "collapse.png")
    args = parser.parse_args()
    jobs = [
        Job("tmaze", "xlstm", seed, (*SETTING, floor), label) for label, floor in FLOORS.items() for seed in args.seeds
    ]
    run_all(jobs, args.workers)
    results = read(jobs)
    print(render(results))
    draw(results, args.figure, columns=1)
    for label in FLOORS:
        print(f"{label}: {_dips([result['curve'] for result in results if result['label'] == label])}")


def _dips(curves: list[list[dict[str, float]]]) -> str:
    after = solved = dips = 0
    for curve in curves:
        returns = [row["mean_return"] for row in curve if row["kind"] == "eval"]
        first = next((index for index, value in enumerate(returns) if value >= 0.95), None)
        if first is None:
            continue
        solved += 1
        after += len(returns) - first - 1
        dips += sum(value < 0.75 for value in returns[first + 1 :])
    return f"solved {solved} of {len(curves)}; after that {dips} of {after} evaluations below 0.75"


if __name__ == "__main__":
    main()
