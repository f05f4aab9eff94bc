"""The results of a benchmark as one JSON file, from which everything else is drawn, and as a CSV table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlstm_rl.agents.archive import write_whole
from xlstm_rl.bench.plan import PlannedRun
from xlstm_rl.bench.records import Record
from xlstm_rl.bench.spec import BenchSpec
from xlstm_rl.configs import ConfigError

RESULTS = "results.json"


@dataclass(frozen=True)
class Results:
    """What a benchmark showed.

    Attributes:
        name: of the benchmark.
        tasks, agents: in the order of the specification; the first agent is compared with the others.
        seeds: planned.
        solved_score: from which score on a run has solved its task.
        stop_score: at which training ended early, None if it never did.
        parameters_of: agent -> the agent whose size it was given.
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


def gather(name: str, spec: BenchSpec, runs: Sequence[PlannedRun]) -> Results:
    """The results of the runs as far as they are there.

    Raises:
        ConfigError: a record is damaged.
    """
    records, failures, missing = [], {}, []
    for run in runs:
        if run.record.is_file():
            records.append(read_record(run.record))
        elif run.failure.is_file():
            failures[run.name] = run.failure.read_text(encoding="utf-8", errors="replace")
        else:
            missing.append(run.name)
    return Results(
        name=name,
        tasks=tuple(spec.tasks),
        agents=tuple(spec.agents),
        seeds=spec.seeds,
        solved_score=spec.solved_score,
        stop_score=spec.stop_score,
        parameters_of={key: agent.parameters_of for key, agent in spec.agents.items() if agent.parameters_of},
        records=tuple(records),
        failures=failures,
        missing=tuple(missing),
    )


def write_results(results: Results, out: Path) -> None:
    """Write results.json and results.csv."""
    out.mkdir(parents=True, exist_ok=True)
    values = {f.name: getattr(results, f.name) for f in dataclasses.fields(results) if f.name != "records"}
    head = json.dumps(values, indent=1)[:-2]
    # a record a line, so that files of two versions can be compared
    lines = ",\n  ".join(record.to_json() for record in results.records)
    write_whole(out / RESULTS, f'{head},\n "records": [\n  {lines}\n ]\n}}\n'.encode())
    write_whole(out / "results.csv", _table(results).encode())


def read_results(out: Path) -> Results:
    """What `write_results` wrote in a folder.

    Raises:
        ConfigError: there is no such file, or it is damaged.
    """
    path = out / RESULTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(values[name]) for name in ("tasks", "agents", "seeds", "missing")}
        records = tuple(Record.from_values(record) for record in values["records"])
        return Results(**{**values, **lists, "records": records})
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; give a folder that `xlstm-rl bench run` made") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {error}; make it again with `xlstm-rl bench run`") from error


def read_record(path: Path) -> Record:
    """The record that a worker left.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return Record.from_values(json.loads(path.read_text(encoding="utf-8")))
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
