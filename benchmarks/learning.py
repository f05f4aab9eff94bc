"""What agents learn: presets x memories x seeds, run side by side, resumable, as a table and a figure.

    python -m benchmarks.learning                          # every task, xLSTM, LSTM and no memory, three seeds
    python -m benchmarks.learning --tasks tmaze --seeds 0 --set ppo.advantage_floor=0 --label "no floor"
    python -m benchmarks.learning --render                 # the table and the figure again, nothing is run

Every run is the preset that `xlstm-rl train` uses; only the memory and what `--set` says differ. A finished run leaves
one JSON file below `benchmarks/results/learning/` and is not run again.
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

RESULTS = Path(__file__).parent / "results" / "learning"
FIGURES = Path(__file__).parents[1] / "docs"
TASKS = ("cartpole-no-velocity", "tmaze", "repeat-previous", "parity", "key-value-recall")
TITLES = {
    "cartpole-no-velocity": "CartPole without velocities",
    "tmaze": "T-maze, length 10",
    "repeat-previous": "repeat previous, lag 4",
    "parity": "parity, 8 bits",
    "key-value-recall": "key-value recall, 8 pairs",
}
# Overrides that turn a preset into the same training with another memory.
AGENTS: dict[str, tuple[str, ...]] = {
    "xlstm": (),
    "lstm": ("memory.name=lstm",),
    "none": ("memory.name=none",),
}


class Job(NamedTuple):
    """One training run; `label` names it among others with the same task, agent and seed."""

    task: str
    agent: str
    seed: int
    overrides: tuple[str, ...] = ()
    label: str = ""

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        name = "-".join(part for part in (self.agent, self.label.replace(" ", "-"), f"seed{self.seed}") if part)
        return RESULTS / self.task / f"{name}.json"


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate; returns what the result file holds."""
    from xlstm_rl.configs import load
    from xlstm_rl.training import train

    config = load(job.task, (*AGENTS[job.agent], f"seed={job.seed}", *job.overrides))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder) / "run")
    return {
        **job._asdict(),
        "total_steps": config.total_steps,
        "cpu_seconds": round(time.process_time() - start, 1),
        "scores": {score.agent: score._asdict() for score in result.scores},
        "curve": [row._asdict() for row in result.rows],
    }


def run_all(jobs: Sequence[Job], workers: int) -> None:
    """Run what has no result yet, each run in a process of its own."""
    todo = [job for job in jobs if not job.path.exists()]
    print(f"{len(jobs) - len(todo)} runs are there, {len(todo)} to do")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(run, job): job for job in todo}
        for done, future in enumerate(as_completed(futures), 1):
            job, result = futures[future], future.result()
            job.path.parent.mkdir(parents=True, exist_ok=True)
            partial = job.path.with_suffix(".part")
            partial.write_text(json.dumps(result) + "\n")
            partial.replace(job.path)
            name = f"{job.task} {job.agent} {job.label} seed {job.seed}"
            print(f"[{done}/{len(todo)}] {name}: {_line(result)}", flush=True)


def _line(result: dict[str, Any]) -> str:
    scores = result["scores"]
    worst = next((s for name, s in scores.items() if name.startswith("worst")), {"mean_return": float("nan")})
    emptied = next(s for name, s in scores.items() if "emptied" in name)
    return (
        f"final {scores['trained agent']['mean_return']:.3g}, worst of last five {worst['mean_return']:.3g}, "
        f"emptied {emptied['mean_return']:.3g}, {result['cpu_seconds']:.0f} CPU s"
    )


def read(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The results that are there."""
    return [json.loads(job.path.read_text()) for job in jobs if job.path.exists()]


def render(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one row per task and agent, figures seed by seed."""
    lines = [
        "| task | memory | final return, by seed | worst of the last 5 evaluations | memory emptied every step | "
        "first evaluation at 95 % of the way to the optimum (1000 steps) | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((result["task"], f"{result['agent']} {result['label']}".strip()), []).append(result)
    for (task, agent), group in rows.items():
        group.sort(key=lambda result: int(result["seed"]))
        columns = [_by_seed(group, key) for key in ("trained agent", "worst of the last 5 evaluations")]
        columns.append(_by_seed(group, "same agent, memory emptied every step"))
        columns.append(" / ".join(_solved_at(result) for result in group))
        seconds = sum(result["cpu_seconds"] for result in group) / len(group)
        lines.append(f"| {TITLES.get(task, task)} | {agent} | {' | '.join(columns)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _by_seed(group: Sequence[dict[str, Any]], name: str) -> str:
    values = [result["scores"][name]["mean_return"] for result in group if name in result["scores"]]
    return " / ".join(f"{value:.0f}" if abs(value) >= 10 else f"{value:.3f}".lstrip("0") for value in values)


def _solved_at(result: dict[str, Any]) -> str:
    scores = result["scores"]
    low, high = scores["best without memory"]["mean_return"], scores["optimum"]["mean_return"]
    evaluations = (row for row in result["curve"] if row["kind"] == "eval")
    good = (row["step"] for row in evaluations if row["mean_return"] >= low + 0.95 * (high - low))
    return next((f"{step / 1000:.0f}" for step in good), "-")


def draw(results: Sequence[dict[str, Any]], path: Path, columns: int = 3, panel_width: float = 4.0) -> None:
    """Evaluation returns over steps, one panel per task: every seed a thin line, their mean a thick one."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tasks = list(dict.fromkeys(result["task"] for result in results))
    agents = list(dict.fromkeys(f"{result['agent']} {result['label']}".strip() for result in results))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(panel_width * min(columns, len(tasks)), 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, min(columns, len(tasks)), squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        for index, agent in enumerate(agents):
            curves = [
                [(row["step"], row["mean_return"]) for row in result["curve"] if row["kind"] == "eval"]
                for result in results
                if result["task"] == task and f"{result['agent']} {result['label']}".strip() == agent
            ]
            for curve in curves:
                panel.plot(*zip(*curve, strict=True), color=f"C{index}", linewidth=0.6, alpha=0.5)
            if curves:
                mean = np.mean(np.array(curves), axis=0)
                panel.plot(mean[:, 0], mean[:, 1], color=f"C{index}", linewidth=2, label=agent)
        scores = next(result["scores"] for result in results if result["task"] == task)
        for name, style in (("best without memory", ":"), ("optimum", "--")):
            panel.axhline(scores[name]["mean_return"], color="0.4", linestyle=style, linewidth=1, label=name)
        panel.set_title(TITLES.get(task, task), fontsize="medium")
        panel.set_xlabel("environment steps")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("evaluation return")
    panels[0].legend(fontsize="x-small")
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="presets")
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=VALUE", help="overrides for every run")
    parser.add_argument("--label", default="", help="names the runs made with --set")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path, default=FIGURES / "learning.png")
    args = parser.parse_args()
    if args.set and not args.label:
        parser.error("--set needs --label, or the runs could not be told from the preset's own")
    jobs = [
        Job(task, agent, seed, tuple(args.set), args.label)
        for task in args.tasks
        for agent in args.agents
        for seed in args.seeds
    ]
    if not args.render:
        run_all(jobs, args.workers)
    results = read(jobs)
    if results:
        print(render(results))
        draw(results, args.figure)


if __name__ == "__main__":
    main()
