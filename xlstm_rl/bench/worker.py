"""One run in a process of its own: train or resume, measure, and leave a record."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.bench.plan import PlannedRun, fingerprint
from xlstm_rl.bench.results import to_json
from xlstm_rl.bench.spec import BenchSpec
from xlstm_rl.runs.returns import Row

# Exit codes of a worker.
DONE, FAILED, INTERRUPTED = 0, 1, 3


def work(run: PlannedRun, spec: BenchSpec) -> None:
    """The body of a worker process; ends it with one of the exit codes."""
    _log_to(run)
    leave_with_the_parent()
    try:
        code = DONE if _finish(run, spec) else INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = FAILED
    sys.stderr.flush()
    # environments may have left threads behind that would keep the process alive
    os._exit(code)


def _finish(run: PlannedRun, spec: BenchSpec) -> bool:
    """Whether the run came to its end and was measured."""
    # Loaded only here: the parent process trains nothing.
    from xlstm_rl.bench.measuring import measure
    from xlstm_rl.runs.build import torch_threads
    from xlstm_rl.runs.folder import RunFolder
    from xlstm_rl.runs.interruption import InterruptedEvaluationError, Interruption
    from xlstm_rl.runs.train import resume, train

    spent = _Spent(run)
    stop_when = spent.noting(_solved(run, spec))
    folder = RunFolder(run.folder)
    # finished but without a checkpoint, it could not be measured on
    begun = folder.config.is_file() and folder.versions.is_file()
    if begun and (folder.list_checkpoints() or not folder.model.is_file()):
        result = resume(run.folder, stop_when=stop_when)
    else:
        # what a process that was killed at the very start left is no run yet
        shutil.rmtree(run.folder, ignore_errors=True)
        # how training is ended early is not in the run's own configuration
        write_whole(run.begun_with, fingerprint(run, spec).encode())
        result = train(run.config, run.folder, stop_when=stop_when)
    if result.interrupted_by is not None:
        spent.note()
        return False
    with torch_threads(run.config.threads), Interruption() as interruption:
        try:
            record = measure(run, spec, result, spent.note, interruption.check)
        except InterruptedEvaluationError:
            spent.note()
            return False
    run.record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(run.record, to_json(record).encode())
    return True


class _Spent:
    """CPU seconds of a run over all its starts, noted in a file; what a killed process spent last is lost."""

    def __init__(self, run: PlannedRun) -> None:
        self._path = run.spent
        try:
            self._before = float(json.loads(self._path.read_text(encoding="utf-8"))["cpu_seconds"])
        except FileNotFoundError:
            self._before = 0.0

    def note(self) -> float:
        """Note and return the seconds until now."""
        seconds = self._before + time.process_time()
        write_whole(self._path, json.dumps({"cpu_seconds": seconds}).encode())
        return seconds

    def noting(self, stop_when: Callable[[Sequence[Row]], bool]) -> Callable[[Sequence[Row]], bool]:
        """`stop_when`, with a note at each call."""

        def noted(rows: Sequence[Row]) -> bool:
            self.note()
            return stop_when(rows)

        return noted


def _solved(run: PlannedRun, spec: BenchSpec) -> Callable[[Sequence[Row]], bool]:
    stop_score = spec.stop_score_of(run.task.name)

    def solved(rows: Sequence[Row]) -> bool:
        last = rows[-spec.stop_evaluations :]
        if stop_score is None or len(last) < spec.stop_evaluations:
            return False
        return min(run.task.score(row.mean_return) for row in last) >= stop_score

    return solved


def _log_to(run: PlannedRun) -> None:
    """Send all output, that of crashing libraries too, to the log of the run, of this start alone."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with contextlib.suppress(AttributeError, OSError):
        # Ctrl-C is for the parent, which asks its workers to stop
        os.setsid()


def leave_with_the_parent() -> None:
    """End this process when the parent is gone, so that nobody else goes on with its run at the same time."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
