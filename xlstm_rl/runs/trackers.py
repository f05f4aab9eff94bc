"""Where the numbers of a run go: TensorBoard events, Weights & Biases, MLflow; cut anywhere and resumed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, configure

from xlstm_rl.agents.checkpoint import flush_file, write_whole
from xlstm_rl.configs import ConfigError, TrainConfig
from xlstm_rl.runs.folder import RunFolder

# Of MLflow: parameters in one request.
MOST_PARAMETERS = 100


class Tracker(Protocol):
    """A run in a service that keeps the numbers of many."""

    identity: str
    """With which the service finds the run again."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers at an environment step."""

    def show(self, name: str, file: Path) -> None:
        """A PNG or GIF."""

    def end(self, *, failed: bool) -> None:
        """Nothing more comes, for now."""


class WandbRun:
    """A run of Weights & Biases; one that goes on keeps its id, offline too, where `wandb sync` joins the parts."""

    def __init__(self, config: TrainConfig, folder: Path, identity: str | None) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=config.logging.project,
            id=identity,
            name=folder.name,
            dir=str(folder),
            config=dataclasses.asdict(config),
            resume="allow",
            reinit="create_new",
        )
        # steps of their own: a run that goes on from a checkpoint does some again, and wandb's may not decrease
        self._run.define_metric("*", step_metric="steps")
        self.identity: str = self._run.id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**numbers, "steps": step})

    def show(self, name: str, file: Path) -> None:
        """See `Tracker`."""
        kind = self._wandb.Image if file.suffix == ".png" else self._wandb.Video
        self._run.log({name: kind(str(file))})

    def end(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class MlflowRun:
    """A run of MLflow."""

    def __init__(self, config: TrainConfig, folder: Path, identity: str | None) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        if identity is not None:
            self._client.update_run(identity, status="RUNNING")
            self.identity = identity
            return
        project = config.logging.project
        experiment = self._client.get_experiment_by_name(project)
        known = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        self.identity = self._client.create_run(known, run_name=folder.name).info.run_id
        values = [self._entities.Param(*item) for item in _flat(dataclasses.asdict(config)).items()]
        for start in range(0, len(values), MOST_PARAMETERS):
            self._client.log_batch(self.identity, params=values[start : start + MOST_PARAMETERS])

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_plain(name), value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def show(self, name: str, file: Path) -> None:
        """See `Tracker`."""
        self._client.log_artifact(self.identity, str(file))

    def end(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.identity, "FAILED" if failed else "FINISHED")


# Packages of the same names; TensorBoard has a writer of Stable-Baselines3.
TRACKERS: dict[str, Callable[[TrainConfig, Path, str | None], Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError where a tracker's package is missing."""
    for name in config.logging.trackers:
        if name in TRACKERS:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(
                    f"logging.trackers={[*config.logging.trackers]} needs the package {name!r} ({error}): "
                    f"pip install 'xlstm_rl[{name}]'"
                ) from error


class Trackers(KVWriter):
    """The trackers of a run, as one writer of a Stable-Baselines3 logger; a context manager.

    What goes wrong with one of them is told once, and training goes on without it. `trackers.json` in the run folder
    keeps the names that they gave the run, so that it goes on under the same ones.

    Args:
        config: of the run.
        folder: of the run, with the processes that train in it.

    Raises:
        ConfigError: one of them cannot be opened.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        known = json.loads(folder.trackers.read_text(encoding="utf-8")) if folder.trackers.is_file() else {}
        self._open: dict[str, Tracker] = {}
        # of several processes rank 0 alone tells anybody
        for name in config.logging.trackers if folder.group.rank == 0 else ():
            if name in TRACKERS:
                try:
                    self._open[name] = TRACKERS[name](config, folder.path, known.get(name))
                # whatever a service or its package says
                except Exception as error:
                    self.__exit__(type(error), error, None)
                    raise ConfigError(
                        f"logging.trackers: {name} cannot be opened: {error}; leave it out, or see its own settings"
                    ) from error
        if self._open:
            names = {name: tracker.identity for name, tracker in self._open.items()}
            write_whole(folder.trackers, json.dumps({**known, **names}).encode())

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._open)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._each(lambda tracker: tracker.end(failed=kind is not None))

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Numbers, as the logger hands them over."""
        self.log({name: float(value) for name, value in key_values.items() if _is_number(value)}, step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers by name at an environment step."""
        self._each(lambda tracker: tracker.log(numbers, step))

    def show(self, name: str, file: Path) -> None:
        """A PNG or GIF, if it is there."""
        if file.is_file():
            self._each(lambda tracker: tracker.show(name, file))

    def close(self) -> None:
        """Of the logger, after which the closing scores are still to come."""

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            # whatever a service or its package says: it must not end a run
            except Exception as error:
                del self._open[name]
                warnings.warn(f"{name} failed, and the run goes on without it: {error}", stacklevel=2)


def _plain(name: str) -> str:
    """Without what MLflow takes in no name."""
    return re.sub(r"[^\w\-. :/]", "", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "ndim") and value.ndim == 0)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Values as text, by dotted name."""
    found: dict[str, str] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{before}{key}.") if inner else {f"{before}{key}": str(value)}
    return found


def open_logger(
    folder: Path, step: int, pending: Mapping[str, Sequence[Any]], further: Sequence[KVWriter], *, tensorboard: bool
) -> Logger:
    """A logger with values that wait to be written.

    Args:
        folder: of the TensorBoard events.
        step: events after this one are declared void.
        pending: values, see `pending_numbers`.
        further: writers beside TensorBoard's.
        tensorboard: whether there are events.
    """
    logger = _open_events(folder, step) if tensorboard else Logger(None, [])
    logger.output_formats += further
    for name, (value, count, excluded) in pending.items():
        logger.name_to_value[name], logger.name_to_count[name] = value, count
        logger.name_to_excluded[name] = tuple(excluded)
    return logger


def _open_events(folder: Path, step: int) -> Logger:
    names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    before = [int(parts[3]) for parts in names if parts[3].isdecimal()]
    if max(before, default=0) >= int(time.time()):
        # readers order files by the second in their names
        time.sleep(1.0)
    logger = configure(str(folder), ["tensorboard"])
    if before:
        # Loaded here because only resumed runs need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        for output in logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat) and output.writer is not None:
                output.writer._get_file_writer().add_event(restart, step + 1)  # type: ignore[no-untyped-call]
    return logger


def flush_events(logger: Logger, folder: Path) -> dict[str, int]:
    """Put all events on the disk; sizes of the files by name."""
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat) and output.writer is not None:
            output.writer.flush()
    paths = sorted(folder.glob("events.out.tfevents.*"))
    for path in paths:
        flush_file(path)
    return {path.name: path.stat().st_size for path in paths}


def pending_numbers(logger: Logger) -> dict[str, list[Any]]:
    """Numbers that were recorded but not written yet, for `open_logger`."""
    return {
        name: [value, logger.name_to_count[name], list(logger.name_to_excluded[name])]
        for name, value in logger.name_to_value.items()
        if isinstance(value, int | float)
    }
