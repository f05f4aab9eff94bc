"""A study: trials of settings on one task, by workers on one machine or several, until a budget is spent."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.configs import ConfigError, TrainConfig, dump, load
from xlstm_rl.memory import XLSTM, make_memory
from xlstm_rl.memory.core import memory_defaults
from xlstm_rl.runs.build import make_env, make_model
from xlstm_rl.runs.returns import Row
from xlstm_rl.runs.train import TrainingStoppedError, train
from xlstm_rl.tuning.space import PORTFOLIO, SPACES, Space, known_values, spell, study_space, suggest

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

INSTALL = "pip install optuna"
# In every trial, at equal distances; what the pruner counts in.
EVALUATIONS = 10
# The objective is the mean return of so many at the end: less noisy than the last alone.
JUDGED = 3
# Trials train with seeds from here on, so that runs with the usual ones are no part of the choice.
FIRST_SEED = 10_000


@dataclass(frozen=True)
class Tuning:
    """The search for one task.

    Attributes:
        name: a preset, environment id or .yaml file, as `xlstm-rl train` takes it.
        overrides: of its settings, as `xlstm-rl train` takes them; where the search starts from.
        out: the folder of the journal and the report.
        runs: the budget of all trials together, in whole trainings of `total_steps`.
        minutes: no trial starts later than this; None for no bound.
        storage: a database of Optuna that several machines reach, such as "sqlite:///tune.db" or
            "postgresql://host/name"; None keeps a journal in `out`, which may lie on a file system that they share.
    """

    name: str
    overrides: tuple[str, ...]
    out: Path
    runs: float = 12.0
    minutes: float | None = None
    storage: str | None = None

    @property
    def config(self) -> TrainConfig:
        """The settings that are tuned."""
        return load(self.name, self.overrides)

    @property
    def budget(self) -> int:
        """Environment steps of all trials together."""
        return round(self.runs * self.config.total_steps)

    @property
    def space(self) -> Space:
        """What is searched."""
        return study_space(self.config.memory.name, flat(self.config))

    def trial_config(self, overrides: Sequence[str]) -> TrainConfig:
        """The task with the settings of a trial, at its own budget and evaluation."""
        return load(self.name, [*self.overrides, *overrides])


def flat(config: TrainConfig) -> dict[str, Any]:
    """The settings of memory, policy and training by dotted key, defaults of the memory included."""
    values = yaml.safe_load(dump(config))
    sections = {"memory": _memory_settings(config), "policy": values["policy"], "ppo": values["ppo"]}
    return {f"{part}.{key}": value for part, section in sections.items() for key, value in section.items()}


def _memory_settings(config: TrainConfig) -> dict[str, Any]:
    memory = make_memory(config.memory.name, 1, **config.memory.settings)
    defaults = vars(memory.config) if isinstance(memory, XLSTM) else memory_defaults(config.memory.name)
    given = {"name": config.memory.name, **config.memory.settings}
    # tuples become lists, as they are in YAML
    plain: dict[str, Any] = json.loads(json.dumps({**defaults, **given}))
    return plain


def _check_installed() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(f"tuning needs the package optuna: {INSTALL}")


@contextlib.contextmanager
def storage_told(tuning: Tuning) -> Iterator[None]:
    """What goes wrong with the database as `ConfigError`, in a sentence."""
    _check_installed()
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    # drivers that are missing, and kinds of databases that Optuna does not know
    except (ImportError, NotImplementedError, SQLAlchemyError, StorageInternalError) as error:
        said = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(f"--storage {tuning.storage} cannot be used: {said}; what is in it is kept") from error


def _mend_journal(path: Path) -> None:
    """Take away the torn last line that a power cut or a full disk leaves.

    Raises:
        ConfigError: another line is damaged, after which nothing can be counted on.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.is_file():
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        damaged = [number for number, line in enumerate(lines) if not _is_entry(line)]
        if damaged and damaged[0] < len(lines) - 1:
            raise ConfigError(f"line {damaged[0] + 1} of {path} is damaged: put the file back, or choose another --out")
        if damaged:
            warnings.warn(f"the last line of {path} was torn and is taken away", stacklevel=3)
            write_whole(path, b"".join(lines[:-1]))
    finally:
        lock.release()


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(entry, dict) and "op_code" in entry


def open_study(tuning: Tuning) -> Study:
    """The study with the trials that are there; the portfolio waits in a new one.

    Raises:
        ConfigError: Optuna is not installed, the study was begun with other settings, or its journal is damaged.
    """
    _check_installed()
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tuning.out.mkdir(parents=True, exist_ok=True)
    if tuning.storage is None:
        _mend_journal(tuning.out / "journal.log")
    journal = JournalStorage(JournalFileBackend(str(tuning.out / "journal.log"))) if tuning.storage is None else None
    study = optuna.create_study(
        storage=journal or tuning.storage,
        study_name=tuning.name,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.HyperbandPruner(min_resource=2, max_resource=EVALUATIONS, reduction_factor=3),
    )
    made_with = repr((dump(tuning.config), tuning.space))
    if study.user_attrs.get("made_with", made_with) != made_with:
        raise ConfigError(
            f"the study of {tuning.name} in {tuning.storage or tuning.out} was begun with other settings or "
            "with another search; choose another --out, or give the same KEY=VALUE as then"
        )
    study.set_user_attr("made_with", made_with)
    if not study.get_trials(deepcopy=False):
        for kind, settings in _portfolio(tuning):
            study.enqueue_trial(known_values(tuning.space, settings), {"kind": kind}, skip_if_exists=True)
    return study


def _portfolio(tuning: Tuning) -> list[tuple[str, dict[str, Any]]]:
    """By name, all settings of each; those that are equal to one before are left out."""
    base, seen, kept = flat(tuning.config), [], []
    for kind, changes in PORTFOLIO.items():
        settings = {**base, **{key: value for key, value in changes.items() if key in base}}
        if settings not in seen:
            seen.append(settings)
            kept.append((kind, settings))
    return kept


def run_trial(tuning: Tuning, size: MemorySize, study: Study, trial: Trial) -> Signals | None:
    """Do a trial; returns the signal that interrupted it."""
    from optuna.trial import TrialState

    trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
    chosen, stopped, start = suggest(trial, tuning.space), "", time.process_time()
    overrides = [f"{key}={spell(value)}" for key, value in chosen.items()]
    watch, rows = _Watch(trial), []
    try:
        overrides += _width(tuning.trial_config(overrides), size)
        config = tuning.trial_config(overrides)
        every_steps = max(config.total_steps // EVALUATIONS, 1)
        trial.set_user_attr("overrides", overrides)
        config = dataclasses.replace(
            config,
            seed=FIRST_SEED + trial.number,
            threads=1,
            eval=dataclasses.replace(config.eval, every_steps=every_steps, n_episodes=1),
            checkpoint=dataclasses.replace(config.checkpoint, every_steps=None),
        )
        with tempfile.TemporaryDirectory() as folder:
            result = train(config, Path(folder) / "run", stop_when=watch)
        if result.interrupted_by is not None:
            _do_again(study, trial.number)
            return result.interrupted_by
        rows = [row for row in result.rows if row.kind == "eval"]
    # settings that cannot be built or that end in NaN are a bad choice of the trial, which counts as any other
    except (ConfigError, TrainingStoppedError) as error:
        stopped = str(error)
    trial.set_user_attr("stopped", stopped)
    trial.set_user_attr("steps", rows[-1].step if rows else watch.steps)
    trial.set_user_attr("cpu_seconds", round(time.process_time() - start, 1))
    if watch.pruned or not rows:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, objective([row.mean_return for row in rows]))
    return None


class _Watch:
    """Reports the evaluations of a trial; as `stop_when`, ends training where the trial is pruned."""

    def __init__(self, trial: Trial) -> None:
        self.pruned, self.steps = False, 0
        self._trial, self._reported = trial, 0

    def __call__(self, rows: Sequence[Row]) -> bool:
        """Called with all evaluations so far, more than once with the same ones."""
        if len(rows) > self._reported:
            self._reported, self.steps = len(rows), rows[-1].step
            self._trial.report(rows[-1].mean_return, len(rows))
            self._trial.set_user_attr("steps", self.steps)
            self.pruned = len(rows) < EVALUATIONS and self._trial.should_prune()
        return self.pruned


def objective(returns: Sequence[float]) -> float:
    """What a trial is judged by: the mean return of its last evaluations."""
    return fmean(returns[-JUDGED:])


def spent(study: Study) -> int:
    """Environment steps of all trials, running ones included."""
    return sum(int(trial.user_attrs.get("steps", 0)) for trial in study.get_trials(deepcopy=False))


def close_lost(study: Study) -> None:
    """Trials whose process on this machine is gone, as after a power cut, are done again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get("worker", [None, 0])
        if host == socket.gethostname() and not _runs(process):
            _do_again(study, trial.number)


def _do_again(study: Study, number: int) -> None:
    from optuna.trial import TrialState

    trial: FrozenTrial = study.get_trials(deepcopy=False)[number]
    study.tell(number, state=TrialState.FAIL)
    study.enqueue_trial(trial.params, {name: trial.user_attrs[name] for name in ("kind",) if name in trial.user_attrs})


def _runs(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(process, 0)
        except PermissionError:
            return True
        return True
    return False


class MemorySize(NamedTuple):
    """Of the actor's memory that is tuned."""

    inputs: int
    parameters: int


def memory_size(config: TrainConfig) -> MemorySize:
    """Of the settings that are tuned; builds the agent once."""
    with closing(make_env(config, 1, config.seed, here=True)) as env:
        memory = make_model(dataclasses.replace(config, device="cpu"), env).policy.memory_actor
    return MemorySize(memory.input_size, sum(parameter.numel() for parameter in memory.parameters()))


def _width(config: TrainConfig, size: MemorySize) -> list[str]:
    """The width with which the memory of a trial has about as many parameters as the one that is tuned."""
    if config.memory.name not in SPACES:
        return []
    settings = {key: value for key, value in config.memory.settings.items() if key != "hidden_size"}
    try:
        core = make_memory(config.memory.name, size.inputs, match_parameters=size.parameters, **settings)
    except ValueError as error:
        raise ConfigError(f"memory {config.memory.name!r}: {error}") from error
    return [f"memory.hidden_size={core.output_size}"]
