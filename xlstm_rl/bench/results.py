"""What the runs of a benchmark showed: one JSON file, from which everything else is drawn, and a CSV table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.bench.plan import PlannedRun
from xlstm_rl.bench.spec import BenchSpec
from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.validation import build, settings

RESULTS = "results.json"


@settings
class Figure:
    """The outcome of some episodes.

    Attributes:
        mean_return: over the episodes.
        standard_error: of the mean return.
        score: 0 for the best policy without memory, 1 for the optimum.
        episodes: how many were played; each is several in a row where `Record.in_a_row` says so.
    """

    mean_return: float
    standard_error: float
    score: float
    episodes: int


@settings
class StateHealth:
    """The memory state of one environment over the longest episodes that were played.

    Attributes:
        bytes_first, bytes_last: after the first and the last step; equal where the state does not grow.
        largest: the largest absolute value met.
        finite: whether every value was.
        length: at how many times the training length, or how many episodes in a row.
    """

    bytes_first: int
    bytes_last: int
    largest: float
    finite: bool
    length: int


@settings
class Record:
    """What one run showed.

    Attributes:
        task, agent, seed: which run.
        fingerprint: of all settings, see `xlstm_rl.bench.plan.fingerprint`.
        ability: what the task tests.
        env: its environment id.
        memory: name of the memory, with its blocks where it has such.
        parameters, memory_parameters: of the whole policy, and of the actor's memory alone.
        tuning_runs: spent on the agent's settings.
        total_steps, steps: environment steps planned and trained; fewer where training ended early as solved.
        optimal_return, memoryless_return: the bounds of the score.
        curve: [step, mean return] of each evaluation during training.
        greedy, sampled: final weights, with the mode of the policy and with samples of it.
        emptied: greedy, with the memory emptied at every step.
        oracle: the scripted oracle in episodes of the same seeds; None where the environment has none.
        longer: greedy at "4" and "16" times the training length, the state carried.
        state: of the memory.
        cpu_minutes: of all starts of the run, measuring included; without what environments in processes of their own
            spent (`env.vec=subproc`).
        versions: packages, platform and machine.
        in_a_row: whether `longer` is of so many episodes in a row, as in tasks without a length.
    """

    task: str
    agent: str
    seed: int
    fingerprint: str
    ability: str
    env: str
    memory: str
    parameters: int
    memory_parameters: int
    tuning_runs: int
    total_steps: int
    steps: int
    optimal_return: float
    memoryless_return: float
    curve: list[list[float]]
    greedy: Figure
    sampled: Figure
    emptied: Figure
    oracle: Figure | None
    longer: dict[str, Figure]
    state: StateHealth
    cpu_minutes: float
    versions: dict[str, Any]
    in_a_row: bool = False

    @property
    def curve_scores(self) -> list[tuple[int, float]]:
        """(step, score) of each evaluation during training."""
        span = self.optimal_return - self.memoryless_return
        return [(int(step), (mean_return - self.memoryless_return) / span) for step, mean_return in self.curve]

    @property
    def worst_of_last_five(self) -> float | None:
        """The lowest score of the last five evaluations during training; None before there were five."""
        scores = [score for _, score in self.curve_scores[-5:]]
        return min(scores) if len(scores) == 5 else None

    def steps_to(self, score: float) -> int | None:
        """Steps at the first evaluation that reached a score; None where none did."""
        return next((step for step, reached in self.curve_scores if reached >= score), None)


@settings
class Results:
    """What a benchmark showed.

    Attributes:
        name: of the benchmark.
        tasks, agents: in the order of the specification; the first agent is compared with the others.
        seeds: planned.
        solved_score: from which score on a run has solved its task.
        stop_score: at which training ended early, None if it never did.
        parameters_of: agent -> the agent whose size it was given.
        score: what a score is, "memory" or "return", see `xlstm_rl.bench.spec.BenchSpec`.
        published: task -> column -> mean return that others have published.
        records: of the runs that finished.
        failures: run name -> why it failed.
        missing: names of the runs that were planned and are not done.
    """

    name: str
    tasks: tuple[str, ...]
    agents: tuple[str, ...]
    seeds: tuple[int, ...]
    solved_score: float
    stop_score: float | None
    parameters_of: Mapping[str, str]
    records: tuple[Record, ...]
    failures: Mapping[str, str]
    missing: tuple[str, ...]
    score: str = "memory"
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def score_label(self) -> str:
        """What the scores of its records are, for an axis."""
        return "mean return" if self.score == "return" else "score"

    def of(self, task: str, agent: str) -> list[Record]:
        """The records of a task and an agent, by seed."""
        chosen = [record for record in self.records if (record.task, record.agent) == (task, agent)]
        return sorted(chosen, key=lambda record: record.seed)

    def scores(
        self, agent: str, tasks: Sequence[str] | None = None, *, sampled: bool = False
    ) -> list[NDArray[np.float64]]:
        """Final greedy or sampled scores of an agent, an array of seeds for each task that it has any on."""
        groups = (self.of(task, agent) for task in (self.tasks if tasks is None else tasks))
        return [
            np.array([(record.sampled if sampled else record.greedy).score for record in group])
            for group in groups
            if group
        ]

    def share_of_tasks(self, agent: str, tasks: Sequence[str] | None = None) -> str | None:
        """Such as "19 of 20 tasks" where an agent has runs on some of them only, and its figures tell no more."""
        count, whole = len(self.scores(agent, tasks)), len(self.tasks if tasks is None else tasks)
        return f"{count} of {whole} tasks" if 0 < count < whole else None

    def abilities(self) -> dict[str, list[str]]:
        """Ability -> its tasks, in the order of the tasks."""
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            ability = next((record.ability for record in self.records if record.task == task), None)
            if ability is not None:
                found.setdefault(ability, []).append(task)
        return found


def read_records(runs: Sequence[PlannedRun]) -> dict[str, Record]:
    """The records that are there, by the name of their run: what a worker left, else what results.json holds.

    Raises:
        ConfigError: a record is damaged.
    """
    kept = {out: read_results(out).records for out in {run.out for run in runs} if (out / RESULTS).is_file()}
    known = {(out, f"{one.task}/{one.agent}/{one.seed}"): one for out, records in kept.items() for one in records}
    found = {run.name: known.get((run.out, run.name)) for run in runs}
    found |= {run.name: read_record(run.record) for run in runs if run.record.is_file()}
    return {name: record for name, record in found.items() if record is not None}


def gather(name: str, spec: BenchSpec, runs: Sequence[PlannedRun]) -> Results:
    """The results of the runs as far as they are there.

    Raises:
        ConfigError: a record is damaged.
    """
    records = read_records(runs)
    left = [run for run in runs if run.name not in records]
    failed = {run.name: run.failure for run in left if run.failure.is_file()}
    return Results(
        name=name,
        tasks=tuple(spec.tasks),
        agents=tuple(spec.agents),
        seeds=spec.seeds,
        solved_score=spec.solved_score,
        stop_score=spec.stop_score,
        parameters_of={key: agent.parameters_of for key, agent in spec.agents.items() if agent.parameters_of},
        records=tuple(records.values()),
        failures={name: path.read_text(encoding="utf-8", errors="replace") for name, path in failed.items()},
        missing=tuple(run.name for run in left if run.name not in failed),
        score=spec.score,
        published={key: task.published for key, task in spec.tasks.items() if task.published},
    )


def write_results(results: Results, out: Path) -> None:
    """Write results.json and results.csv."""
    out.mkdir(parents=True, exist_ok=True)
    values = {f.name: getattr(results, f.name) for f in dataclasses.fields(results) if f.name != "records"}
    head = json.dumps(values, indent=1)[:-2]
    # a record a line, so that files of two versions can be compared
    lines = ",\n  ".join(map(to_json, results.records))
    write_whole(out / RESULTS, f'{head},\n "records": [\n  {lines}\n ]\n}}\n'.encode())
    write_whole(out / "results.csv", _table(results).encode())


def read_results(out: Path) -> Results:
    """What `write_results` wrote in a folder.

    Raises:
        ConfigError: there is no such file, or it is damaged.
    """
    path = out / RESULTS
    try:
        return build(Results, json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; give a folder that `xlstm-rl bench run` made") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be used: {error}; make it again with `xlstm-rl bench run`") from error


def to_json(record: Record) -> str:
    """A record as JSON text."""
    return json.dumps(dataclasses.asdict(record))


def read_record(path: Path) -> Record:
    """The record that a worker left.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return build(Record, json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; remove it to do the run again") from error


def _table(results: Results) -> str:
    text = io.StringIO()
    rows = [_row(record, results.solved_score) for record in results.records]
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(record: Record, solved_score: float) -> dict[str, Any]:
    figures = {"oracle": record.oracle, "length_4": record.longer.get("4"), "length_16": record.longer.get("16")}
    names = ("task", "ability", "env", "agent", "seed", "memory", "parameters", "memory_parameters", "tuning_runs")
    return {
        **{name: getattr(record, name) for name in names},
        "steps": record.steps,
        "return": record.greedy.mean_return,
        "return_error": record.greedy.standard_error,
        "score": record.greedy.score,
        "sampled": record.sampled.score,
        "emptied": record.emptied.score,
        **{name: "" if figure is None else figure.score for name, figure in figures.items()},
        "in_a_row": record.in_a_row,
        "worst_of_last_five": record.worst_of_last_five,
        "steps_to_solved": record.steps_to(solved_score),
        "state_bytes": record.state.bytes_last,
        "state_largest": record.state.largest,
        "cpu_minutes": record.cpu_minutes,
    }
