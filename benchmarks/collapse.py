"""The collapse of PPO on a solved sparse task: stock PPO, each of the two cures alone, and both.

    python -m benchmarks.collapse        # T-maze of length 10, constant learning rate, three seeds each

Stock PPO divides every rollout's advantages by their standard deviation, which is the critic's error once the task is
solved, and lets one rare gradient through to an Adam that has forgotten what large gradients are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.learning import FIGURES, Job, draw, read, render, run_all

SETTING = ("total_steps=400000", "ppo.lr_schedule=constant", "eval.every_steps=4000", "eval.n_episodes=100")
CURES = {
    "stock": ("ppo.advantage_floor=0.0", "ppo.grad_spike_factor=null"),
    "floor": ("ppo.advantage_floor=0.1", "ppo.grad_spike_factor=null"),
    "spike bound": ("ppo.advantage_floor=0.0", "ppo.grad_spike_factor=5"),
    "both": ("ppo.advantage_floor=0.1", "ppo.grad_spike_factor=5"),
}


def main() -> None:
    """Run what has no result yet, print the table, draw the figure, count the dips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, default=FIGURES / "collapse.png")
    args = parser.parse_args()
    jobs = [
        Job("tmaze", "xlstm", seed, (*SETTING, *cure), label) for label, cure in CURES.items() for seed in args.seeds
    ]
    run_all(jobs, args.workers)
    results = read(jobs)
    print(render(results))
    draw(results, args.figure, columns=1, panel_width=8.0)
    for label in CURES:
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
