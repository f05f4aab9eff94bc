"""The collapse of PPO on a solved sparse task: stock PPO, each of the two cures alone, and both.

    python -m benchmarks.collapse             # T-maze of length 10, constant learning rate, three seeds each
    python -m benchmarks.collapse --render    # the table and the figure again, nothing is run

Stock PPO divides every rollout's advantages by their standard deviation, which is the critic's error once the task is
solved, and lets one rare gradient through to an Adam that has forgotten what large gradients are. A finished run leaves
one JSON file below `benchmarks/results/collapse/` and is not run again; one of other settings is refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_rl.configs import ConfigError, TrainConfig, dump, load

RESULTS = Path(__file__).parent / "results" / "collapse"
FIGURE = Path(__file__).parents[1] / "docs" / "collapse.png"
SETTING = (
    *("memory.blocks=m", "memory.slstm_num_heads=null", "memory.recurrent_std=0", "memory.init=reference"),
    *("total_steps=400000", "ppo.lr_schedule=constant", "eval.every_steps=4000", "eval.n_episodes=100"),
)
CURES = {
    "stock": ("ppo.advantage_floor=0.0", "ppo.grad_spike_factor=null"),
    "floor": ("ppo.advantage_floor=0.1", "ppo.grad_spike_factor=null"),
    "spike bound": ("ppo.advantage_floor=0.0", "ppo.grad_spike_factor=5"),
    "both": ("ppo.advantage_floor=0.1", "ppo.grad_spike_factor=5"),
}
# Evaluation returns from which on the task counts as solved, and below which the agent has collapsed.
SOLVED, DIP = 0.95, 0.75


class Job(NamedTuple):
    """One training run."""

    label: str
    seed: int

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RESULTS / f"{self.label.replace(' ', '-')}-{self.seed}.json"

    @property
    def config(self) -> TrainConfig:
        """All settings."""
        return load("tmaze", (*SETTING, *CURES[self.label], f"seed={self.seed}"))


def check_settings(jobs: Sequence[Job]) -> None:
    """Raise ConfigError if a result that is there was made with other settings."""
    for job in jobs:
        now = dump(job.config)
        # the first results did not say how they were made
        if job.path.exists() and json.loads(job.path.read_text()).get("config", now) != now:
            raise ConfigError(f"{job.path} was made with other settings; remove it, and the run is done again")


def run(job: Job) -> dict[str, Any]:
    """Train; returns what the result file holds."""
    from xlstm_rl.runs.train import train

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train(job.config, Path(folder) / "run")
    return {
        **job._asdict(),
        "config": dump(job.config),
        "final_return": result.scores[0].mean_return,
        "cpu_seconds": round(time.process_time() - start, 1),
        "curve": [[row.step, row.mean_return] for row in result.rows if row.kind == "eval"],
    }


def run_all(jobs: Sequence[Job], workers: int) -> None:
    """Run what has no result yet."""
    todo = [job for job in jobs if not job.path.exists()]
    print(f"{len(jobs) - len(todo)} runs are there, {len(todo)} to do")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(run, job): job for job in todo}
        for done, future in enumerate(as_completed(futures), 1):
            job, result = futures[future], future.result()
            job.path.parent.mkdir(parents=True, exist_ok=True)
            partial = job.path.with_suffix(".part")
            partial.write_text(json.dumps(result) + "\n")
            partial.replace(job.path)
            print(f"[{done}/{len(todo)}] {job.label} seed {job.seed}: final {result['final_return']:.2f}", flush=True)


def render(curves: Sequence[Sequence[Sequence[float]]]) -> str:
    """What became of the runs of one cure after each was first solved; a curve is rows of step and return."""
    after = solved = dips = 0
    for curve in curves:
        returns = [value for _, value in curve]
        first = next((index for index, value in enumerate(returns) if value >= SOLVED), None)
        if first is None:
            continue
        solved += 1
        after += len(returns) - first - 1
        dips += sum(value < DIP for value in returns[first + 1 :])
    return f"solved {solved} of {len(curves)}; after that {dips} of {after} evaluations below {DIP}"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Evaluation returns over steps, one panel for each cure, one line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flatten()
    for panel, label in zip(panels, CURES, strict=True):
        for result in results:
            if result["label"] == label:
                panel.plot(*zip(*result["curve"], strict=True), linewidth=1, label=f"seed {result['seed']}")
        panel.axhline(0.5, color="0.4", linestyle=":", linewidth=1, label="best without memory")
        panel.set_title(label, fontsize="medium")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="x-small")
    figure.supxlabel("environment steps", fontsize="medium")
    figure.supylabel("evaluation return", fontsize="medium")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what has no result yet, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    jobs = [Job(label, seed) for label in CURES for seed in args.seeds]
    try:
        check_settings(jobs)
    except ConfigError as error:
        parser.error(str(error))
    if not args.render:
        run_all(jobs, args.workers)
    results = [json.loads(job.path.read_text()) for job in jobs if job.path.exists()]
    for label in CURES:
        print(f"{label}: {render([result['curve'] for result in results if result['label'] == label])}")
    draw(results, args.figure)


if __name__ == "__main__":
    main()
