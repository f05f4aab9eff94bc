"""Tunes memories fairly: on every task the same number of trials for each, all of equal size and equal budget.

    python -m benchmarks.tune --tasks parity tmaze --memories xlstm lstm gru --trials 30
    python -m benchmarks.tune --tasks parity-12 --spec suite --steps 0.5 --seeds 0 1    # tasks of a benchmark
    python -m benchmarks.tune --spec mine.yaml --out tuning/mine --workers 4            # all of them

A study is a memory on a task: TPE chooses settings from `benchmarks.tuning_spaces`, `hidden_size` is chosen so that the
memory has as many parameters as that of the task's preset, and what is not searched stays as in the preset. The same
command goes on with what is in `--out`, and a larger `--trials` continues it. Needs optuna.

The objective is the mean of the evaluation scores over training, not the score of the final weights: it is less noisy,
it tells settings apart that all reach the optimum, it counts a collapse, and it means the same halfway through a trial,
where hopeless ones are pruned.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.util
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.tuning_spaces import MEMORIES, SHARED, suggest
from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.bench.plan import Task, plan_runs
from xlstm_rl.bench.spec import AgentSpec, BenchSpec, TaskSpec, load_spec
from xlstm_rl.bench.worker import leave_with_the_parent
from xlstm_rl.configs import ConfigError, PolicyConfig, PPOConfig, TrainConfig, dump, load
from xlstm_rl.configs.option_types import natural, positive
from xlstm_rl.configs.validation import nearest
from xlstm_rl.memory import make_memory
from xlstm_rl.runs.build import make_env, make_model
from xlstm_rl.runs.lock import LockedError, exclusive
from xlstm_rl.runs.returns import Row
from xlstm_rl.runs.scores import TRAINED
from xlstm_rl.runs.train import TrainingStoppedError, train

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

INSTALL = "pip install optuna"
# In every trial, at equal distances.
EVALUATIONS = 10
# No trial is pruned before others are there to compare it with, and none before half of its first seed.
TRIALS_BEFORE_PRUNING = 5
# A single evaluation counts no less, so that the first policies of a task with large negative returns do not outweigh
# what was learnt.
LOWEST_SCORE = -1.0
STOPPED = 1
USAGE_ERROR = 2
SIGNAL_EXIT = 128


@dataclass(frozen=True)
class Tuning:
    """The study of one memory on one task.

    Attributes:
        task: its name and its known bounds.
        base: its preset, file or environment id.
        task_overrides: what the task sets in `base`.
        memory: its name.
        input_size, parameters: of the memory of the task's preset; each trial has about as many parameters.
        trials: counted ones at the end.
        seeds: each trial trains once with each.
        steps: of each such training.
        out: the folder of all studies.
    """

    task: Task
    base: str
    task_overrides: tuple[str, ...]
    memory: str
    input_size: int
    parameters: int
    trials: int
    seeds: tuple[int, ...]
    steps: int
    out: Path

    @property
    def name(self) -> str:
        """Task and memory."""
        return f"{self.task.name}/{self.memory}"

    @property
    def trial_overrides(self) -> list[str]:
        """Budget and evaluation of a trial."""
        every_steps = max(self.steps // EVALUATIONS, 1)
        budget = {"total_steps": self.steps, "eval.every_steps": every_steps, "checkpoint.every_steps": None}
        return _overrides(budget)

    @property
    def database(self) -> Path:
        """All trials."""
        return self.out / "studies" / f"{self.name}.db"

    @property
    def best(self) -> Path:
        """The whole configuration of the best trial, with the budget of the task."""
        return self.out / "best" / f"{self.name}.yaml"

    def config(self, overrides: Sequence[str]) -> TrainConfig:
        """The task, at its own budget, with other settings."""
        return load(self.base, [*self.task_overrides, *overrides])

    def made_with(self) -> str:
        """Equal for studies whose trials can be compared."""
        kept = {key: value for key, value in vars(self).items() if key not in ("out", "trials")}
        return repr((kept, dump(self.config(())), SHARED, MEMORIES[self.memory]))


def plan(
    tasks: Sequence[str],
    spec: BenchSpec | None,
    memories: Sequence[str],
    trials: int,
    seeds: Sequence[int],
    steps: float,
    out: Path,
) -> list[Tuning]:
    """All studies, task by task, so that an early end leaves whole comparisons.

    Args:
        tasks: names in `spec`, or else presets; none given takes all of `spec`.
        spec: a benchmark.
        memories: to be tuned.
        trials: of every study.
        seeds: of every trial.
        steps: the budget of a trial, a share of the task's up to 1, beyond it in steps and no more than the task's.
        out: the folder.

    Raises:
        ConfigError: a task, a memory or the bounds of a task, which make the score, are unknown.
    """
    for memory in memories:
        if memory not in MEMORIES:
            raise ConfigError(f"memory {memory!r} has no search space; {nearest(memory, MEMORIES)}")
    known = {} if spec is None else spec.tasks
    chosen = {name: known.get(name, TaskSpec()) for name in tasks or known}
    shared = {} if spec is None else spec.set
    planned = plan_runs(BenchSpec(chosen, {"preset": AgentSpec()}, seeds=tuple(seeds), set=shared), out)
    ends = {run.task.name: run.task for run in planned}
    tunings = []
    for name, task in chosen.items():
        base, task_overrides = task.base or name, _overrides({**shared, **task.set})
        config = load(base, task_overrides)
        with closing(make_env(config, 1, config.seed, here=True)) as env:
            memory_of_preset = make_model(dataclasses.replace(config, device="cpu"), env).policy.memory_actor
        budget = max(round(config.total_steps * steps), 1) if steps <= 1 else min(int(steps), config.total_steps)
        tunings += [
            Tuning(
                task=ends[name],
                base=base,
                task_overrides=tuple(task_overrides),
                memory=memory,
                input_size=memory_of_preset.input_size,
                parameters=_count(memory_of_preset),
                trials=trials,
                seeds=tuple(seeds),
                steps=budget,
                out=out,
            )
            for memory in dict.fromkeys(memories)
        ]
    return tunings


def tune(tuning: Tuning) -> int:
    """Do the trials of a study that are not there yet.

    Returns:
        0, or the signal that interrupted it; the interrupted trial is then done again, from its start.

    Raises:
        ConfigError: another process does this study, or it was begun with other settings.
        OSError: files cannot be read or written, the database of the study among them.
    """
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    tuning.database.parent.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(tuning.database.with_suffix(".lock")), _database_told(tuning.database):
            study = open_study(tuning)
            for left in study.get_trials(states=(TrialState.RUNNING,)):
                study.tell(left.number, state=TrialState.FAIL)
            while (number := len(counted(study))) < tuning.trials:
                # Seeded anew for each trial: one sampler would begin again with its first draws in every process.
                study.sampler = TPESampler(seed=number)
                signal = _run(tuning, study, study.ask())
                if signal:
                    return signal
    except LockedError as error:
        raise ConfigError(
            f"{error} is tuning {tuning.name} in {tuning.out}; wait until it has ended, or end it"
        ) from error
    return 0


def open_study(tuning: Tuning) -> Study:
    """The study with the trials that are there.

    Raises:
        ConfigError: it was begun with other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{tuning.database}",
        study_name=tuning.name,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, n_warmup_steps=tuning.steps // 2),
    )
    if study.user_attrs.get("made_with", tuning.made_with()) != tuning.made_with():
        raise ConfigError(
            f"{tuning.name} in {tuning.out} was begun with other settings of task, budget, seeds or search space; "
            f"choose another --out, or remove {tuning.database}"
        )
    study.set_user_attr("made_with", tuning.made_with())
    return study


def counted(study: Study) -> list[FrozenTrial]:
    """The trials that count: those that came to their end or were pruned, not those that were interrupted."""
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _run(tuning: Tuning, study: Study, trial: Trial) -> int:
    """Do a trial; returns the signal that interrupted it, or 0."""
    from optuna.trial import TrialState

    finals: list[float] = []
    steps, stopped, start = 0, "", time.process_time()
    pruning = _Pruning(tuning, trial)
    overrides = _overrides({"memory.name": tuning.memory, **suggest(trial, tuning.memory)})
    try:
        overrides += _width(tuning, overrides)
        for seed in tuning.seeds:
            config = tuning.config([*tuning.trial_overrides, *overrides, f"seed={seed}"])
            with tempfile.TemporaryDirectory() as folder:
                result = train(config, Path(folder) / "run", stop_when=pruning)
            if result.interrupted_by is not None:
                return result.interrupted_by
            steps += result.rows[-1].step
            if pruning.pruned:
                break
            pruning.end_seed(result.rows, steps)
            finals += [tuning.task.score(line.mean_return) for line in result.scores if line.agent == TRAINED]
    # settings that cannot be built or that end in NaN are a bad choice of the trial, which counts as any other
    except (ConfigError, TrainingStoppedError) as error:
        if isinstance(error.__cause__, OSError):
            # a full disk is nobody's choice
            raise error.__cause__ from error
        stopped = str(error)
    noted = {
        "overrides": overrides,
        "final_scores": finals,
        "steps": steps,
        "cpu_seconds": round(time.process_time() - start, 1),
        "stopped": stopped,
    }
    for key, value in noted.items():
        trial.set_user_attr(key, value)
    whole = len(finals) == len(tuning.seeds)
    if whole:
        study.tell(trial, fmean(pruning.scores))
    else:
        study.tell(trial, state=TrialState.PRUNED)
    how = f"mean score {fmean(pruning.scores):.3f}, final {fmean(finals):.3f}" if whole else stopped or "pruned"
    print(f"{tuning.name} {len(counted(study))}/{tuning.trials}: {how}, {noted['cpu_seconds']:.0f} CPU s")
    print("   ", _command(tuning, overrides), flush=True)
    return 0


class _Pruning:
    """Reports the evaluations of a trial to its study; as `stop_when`, ends training where the trial is pruned.

    Attributes:
        scores: of all evaluations of the seeds that are done.
        pruned: whether the trial was.
    """

    def __init__(self, tuning: Tuning, trial: Trial) -> None:
        self.scores: list[float] = []
        self.pruned = False
        self._tuning, self._trial, self._steps, self._reported = tuning, trial, 0, 0

    def __call__(self, rows: Sequence[Row]) -> bool:
        """Called with all evaluations of the running seed, more than once with the same ones."""
        scores = [*self.scores, *self._scores(rows)]
        if len(scores) > self._reported:
            self._reported = len(scores)
            self._trial.report(fmean(scores), self._steps + rows[-1].step)
            self.pruned = self._trial.should_prune()
        return self.pruned

    def end_seed(self, rows: Sequence[Row], steps: int) -> None:
        """Take the evaluations of a seed that is done, after so many steps of all seeds."""
        self._steps = steps
        self.scores += self._scores([row for row in rows if row.kind == "eval"])

    def _scores(self, rows: Sequence[Row]) -> list[float]:
        return [max(self._tuning.task.score(row.mean_return), LOWEST_SCORE) for row in rows]


def _width(tuning: Tuning, overrides: Sequence[str]) -> list[str]:
    settings = {key: value for key, value in tuning.config(overrides).memory.settings.items() if key != "hidden_size"}
    try:
        core = make_memory(tuning.memory, tuning.input_size, match_parameters=tuning.parameters, **settings)
    except ValueError as error:
        raise ConfigError(f"memory {tuning.memory!r}: {error}") from error
    return [f"memory.hidden_size={core.output_size}"]


def _command(tuning: Tuning, overrides: Sequence[str]) -> str:
    words = [*tuning.task_overrides, *tuning.trial_overrides, *overrides, f"seed={tuning.seeds[0]}"]
    # of several for one key the last wins
    last = {word.partition("=")[0]: word for word in words}
    return shlex.join(["xlstm-rl", "train", tuning.base, *last.values()])


def _overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={_spell(value)}" for key, value in values.items()]


def _spell(value: Any) -> str:
    """The value as YAML, words without quotes where they stay words."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gather(tunings: Sequence[Tuning]) -> list[dict[str, Any]]:
    """What is known of every study that was begun."""
    described = []
    for tuning in tunings:
        if tuning.database.is_file():
            with _database_told(tuning.database):
                described.append(_describe(tuning, open_study(tuning)))
    return described


def _describe(tuning: Tuning, study: Study) -> dict[str, Any]:
    trials = [
        {
            "state": trial.state.name.lower(),
            "mean_score": trial.value if trial.state.name == "COMPLETE" else None,
            **trial.user_attrs,
            "command": _command(tuning, trial.user_attrs["overrides"]),
        }
        for trial in counted(study)
    ]
    whole = [trial for trial in trials if trial["state"] == "complete"]
    best = max(whole, key=lambda trial: float(trial["mean_score"]), default=None)
    return {
        "task": tuning.task.name,
        "memory": tuning.memory,
        "seeds": tuning.seeds,
        "parameters_to_match": tuning.parameters,
        "trials": len(trials),
        "pruned": len(trials) - len(whole),
        "steps": sum(trial["steps"] for trial in trials),
        "cpu_minutes": round(sum(trial["cpu_seconds"] for trial in trials) / 60, 2),
        "best": best,
        "all": trials,
    }


def write(tunings: Sequence[Tuning]) -> None:
    """`results.json`, `tuning.md` and the configurations of the best trials."""
    results, out = gather(tunings), tunings[0].out
    write_whole(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    lines = [
        "| task | memory | trials | of these pruned | steps (1000) | CPU min | best mean score | its final score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sections = []
    by_name = {tuning.name: tuning for tuning in tunings}
    for result in results:
        best = result["best"]
        scores = ["-", "-"] if best is None else [f"{best['mean_score']:.3f}", f"{fmean(best['final_scores']):.3f}"]
        figures = [result["trials"], result["pruned"], f"{result['steps'] / 1000:,.0f}", result["cpu_minutes"], *scores]
        lines.append(f"| {' | '.join(map(str, [result['task'], result['memory'], *figures]))} |")
        if best is not None:
            tuning = by_name[f"{result['task']}/{result['memory']}"]
            config = tuning.config(best["overrides"])
            tuning.best.parent.mkdir(parents=True, exist_ok=True)
            write_whole(tuning.best, dump(config).encode())
            sections.append(f"## {tuning.task.name}, {tuning.memory}\n\n```yaml\n{snippet(config)}```\n")
    text = "\n".join(["# Tuning", "", *lines, "", *sections])
    write_whole(out / "tuning.md", text.encode())
    print("\n".join(lines))
    print(f"best settings: {out / 'tuning.md'}; every trial: {out / 'results.json'}")


def snippet(config: TrainConfig) -> str:
    """The sections `memory`, `policy` and `ppo` of a preset, without what is the default there."""
    values = yaml.safe_load(dump(config))
    sections = {"memory": values["memory"]}
    for name, default in (("policy", PolicyConfig()), ("ppo", PPOConfig())):
        sections[name] = {key: value for key, value in values[name].items() if value != getattr(default, key)}
    kept = {name: section for name, section in sections.items() if section}
    return yaml.safe_dump(kept, sort_keys=False, width=120, default_flow_style=None)


def run_all(tunings: Sequence[Tuning], workers: int) -> int:
    """Do the studies side by side; returns the signal that interrupted them, or 0."""
    if workers == 1:
        return next((signal for signal in map(tune, tunings) if signal), 0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=leave_with_the_parent) as pool:
        try:
            return max([future.result() for future in as_completed([pool.submit(tune, one) for one in tunings])])
        # Ctrl-C reaches the workers too
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            return SIGINT


@contextmanager
def _database_told(path: Path) -> Iterator[None]:
    """Errors of the database as those of the file that it is."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        # the innermost one says it in a sentence
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise OSError(errno.EIO, f"the database cannot be used: {cause}", str(path)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and write down what was found; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[], help="presets, or names in --spec; default: all of --spec")
    parser.add_argument("--spec", help="a benchmark such as suite, or a .yaml file")
    parser.add_argument("--memories", nargs="+", default=["xlstm", "lstm"], help=f"of {', '.join(MEMORIES)}")
    parser.add_argument("--trials", type=positive, default=20, help="of every memory on every task (default 20)")
    parser.add_argument(
        "--seeds", nargs="+", type=natural, default=[0], help="every trial trains once with each (default 0)"
    )
    parser.add_argument("--steps", type=float, default=1.0, help="of a trial: a share of the task's, or their number")
    parser.add_argument("--out", type=Path, default=Path("tuning"), help="what is there is gone on with")
    parser.add_argument("--workers", type=positive, default=2, help="studies at the same time (default 2)")
    options = parser.parse_args(arguments)
    if not options.steps > 0:
        parser.error(f"--steps {options.steps} must be above 0")
    if not options.tasks and options.spec is None:
        parser.error("give --tasks, --spec or both")
    if importlib.util.find_spec("optuna") is None:
        print(f"tune: needs the package optuna: {INSTALL}", file=sys.stderr)
        return USAGE_ERROR
    try:
        spec = None if options.spec is None else load_spec(options.spec)
        tunings = plan(options.tasks, spec, options.memories, options.trials, options.seeds, options.steps, options.out)
        try:
            signal = run_all(tunings, options.workers)
        finally:
            write(tunings)
    except ConfigError as error:
        print(f"tune: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        place = "" if error.filename is None else f" ({error.filename})"
        print(f"tune: {error.strerror or error}{place}; what was done until now is kept", file=sys.stderr)
        return STOPPED
    except BrokenExecutor as error:
        print(f"tune: a worker process has died ({error}); the same command goes on", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("tune: interrupted; the same command goes on", file=sys.stderr)
        return SIGNAL_EXIT + SIGINT
    return SIGNAL_EXIT + signal if signal else 0


if __name__ == "__main__":
    sys.exit(main())
