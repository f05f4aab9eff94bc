"""TensorBoard events of a run that may be cut anywhere and resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat, configure

from xlstm_rl.agents.checkpoint import flush_file


def open_logger(folder: Path, step: int, pending: Mapping[str, Sequence[Any]]) -> Logger:
    """TensorBoard events, those after `step` declared void, with values that wait to be written."""
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
    for name, (value, count, excluded) in pending.items():
        logger.name_to_value[name], logger.name_to_count[name] = value, count
        logger.name_to_excluded[name] = tuple(excluded)
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
