"""Running a benchmark: worker processes side by side, one progress view, resumed where it stopped."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from signal import Signals
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.bench.plan import PlannedRun, fingerprint
from xlstm_rl.bench.results import RESULTS, read_records
from xlstm_rl.bench.spec import BenchSpec
from xlstm_rl.bench.worker import DONE, INTERRUPTED, work
from xlstm_rl.configs import ConfigError, load_file
from xlstm_rl.runs.interruption import Interruption
from xlstm_rl.runs.returns import read_returns

POLL_SECONDS = 0.5
LOG_LINES = 200
# What every run loads sooner or later.
LOADED_AHEAD = (
    *("xlstm_rl.bench.measuring", "torch.utils.tensorboard"),
    *("matplotlib.backends.backend_agg", "matplotlib.figure"),
)


@dataclass
class Outcome:
    """How running went.

    Attributes:
        failed: runs that raised or died, this time.
        left: runs that were not finished, failed ones aside.
        interrupted_by: the signal that ended it, None if none did.
    """

    failed: list[PlannedRun] = field(default_factory=list)
    left: list[PlannedRun] = field(default_factory=list)
    interrupted_by: Signals | None = None


def run_all(
    runs: Sequence[PlannedRun],
    spec: BenchSpec,
    *,
    workers: int,
    hours: float | None,
    console: Console,
    after_each: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do the runs that have no record yet; `check_settings` says whether what is there belongs to them.

    A run that was interrupted goes on exactly where its last checkpoint is; one that failed is tried again. After
    SIGINT (Ctrl-C) or SIGTERM the workers save and end.

    Args:
        runs: those to do, done ones included.
        spec: how it is measured.
        workers: processes at the same time, one torch thread each.
        hours: no run starts later than this; None for no bound.
        console: shows progress.
        after_each: called when a run has ended.
    """
    done = read_records(runs)
    todo = [run for run in runs if run.name not in done]
    deadline = float("inf") if hours is None else time.monotonic() + hours * 3600
    outcome = Outcome()
    with Interruption() as interruption, ProgressView(runs, done, console) as view:
        with _Pool(spec, view, outcome, after_each) as pool:
            while True:
                stopping = interruption.signal is not None
                while todo and len(pool.running) < workers and not stopping and time.monotonic() < deadline:
                    pool.start(todo.pop(0))
                if stopping:
                    pool.ask_to_stop()
                if not pool.running:
                    break
                pool.wait()
    outcome.left += todo
    outcome.interrupted_by = interruption.signal
    return outcome


def check_settings(runs: Sequence[PlannedRun], spec: BenchSpec) -> None:
    """Check that what is there of the runs was made with the settings of now.

    Args:
        runs: all that are planned: a card is made of all records, whichever runs are to be done.
        spec: how they are measured.

    Raises:
        ConfigError: a record, or what is left of an earlier start, was made with other settings.
    """
    records = read_records(runs)
    for run in runs:
        record = records.get(run.name)
        same = _goes_on(run, spec) if record is None else record.fingerprint == fingerprint(run, spec)
        if not same:
            raise ConfigError(
                f"{run.name} in {run.out} was made with other settings than the benchmark has now; choose another "
                f"--out, or remove {run.folder if record is None else f'its line from {run.out / RESULTS}'}"
            )


def _goes_on(run: PlannedRun, spec: BenchSpec) -> bool:
    """Whether what is left of an earlier start, if anything, was made with the settings of now."""
    config = run.folder / "config.yaml"
    if not config.is_file():
        return True
    # runs of former versions noted no fingerprint
    noted = run.begun_with.read_text(encoding="utf-8") if run.begun_with.is_file() else None
    return load_file(config) == run.config and noted in (None, fingerprint(run, spec))


class _Pool(AbstractContextManager["_Pool"]):
    """The running workers, which save and end where the block is left with some of them."""

    def __init__(self, spec: BenchSpec, view: ProgressView, outcome: Outcome, after_each: Callable[[], None]) -> None:
        self.running: dict[BaseProcess, PlannedRun] = {}
        self._spec, self._view, self._outcome, self._after_each = spec, view, outcome, after_each
        self._context = _context()
        self._asked = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ask_to_stop()
        for process in self.running:
            process.join()

    def start(self, run: PlannedRun) -> None:
        run.failure.unlink(missing_ok=True)
        process = self._context.Process(  # type: ignore[attr-defined]
            target=work, args=(run, self._spec), name=run.name
        )
        process.start()
        self.running[process] = run
        self._view.start(run)

    def ask_to_stop(self) -> None:
        """SIGTERM, once: a second one would kill a worker that is saving."""
        if not self._asked:
            self._asked = True
            for process in self.running:
                process.terminate()

    def wait(self) -> None:
        """Wait for a moment, show how far the workers are and take leave of those that ended."""
        wait([process.sentinel for process in self.running], timeout=POLL_SECONDS)
        for process, run in list(self.running.items()):
            if process.is_alive():
                self._view.update(run, _steps(run))
                continue
            process.join()
            del self.running[process]
            self._end(run, process.exitcode)
            self._after_each()

    def _end(self, run: PlannedRun, code: int | None) -> None:
        if code == DONE and run.record.is_file():
            self._view.end(run, "done")
        elif code == INTERRUPTED or self._asked:
            self._outcome.left.append(run)
            self._view.end(run, "interrupted", finished=False)
        else:
            self._outcome.failed.append(run)
            reason = _explain(run, code)
            run.failure.parent.mkdir(parents=True, exist_ok=True)
            write_whole(run.failure, reason.encode())
            self._view.end(run, f"failed: {reason.splitlines()[-1]}")


def _context() -> BaseContext:
    """Workers come from one process that has loaded everything and done nothing, where the system knows how."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LOADED_AHEAD])
    return context


def _steps(run: PlannedRun) -> int:
    rows = read_returns(run.folder / "returns.csv")
    return rows[-1].step if rows else 0


def _explain(run: PlannedRun, code: int | None) -> str:
    """The end of the log, which holds the traceback if there was one."""
    how = f"killed by {Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
    try:
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    except FileNotFoundError:
        lines = []
    return "\n".join([f"the worker process was {how}" if "killed" in how else f"the worker process {how}", *lines])


class ProgressView:
    """Shows how far the runs are, with the time left; a context manager.

    Args:
        runs: all that are planned.
        done: names of those that are there already.
        console: where; on a terminal the lines update in place, elsewhere a line comes when a run ends.
    """

    def __init__(self, runs: Sequence[PlannedRun], done: Container[str], console: Console) -> None:
        self._console = console
        self._count = len(runs)
        self._ended, self._failed = sum(run.name in done for run in runs), 0
        self._steps = {run.name: run.config.total_steps if run.name in done else 0 for run in runs}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=300,
        )
        total = sum(run.config.total_steps for run in runs)
        self._whole = self._progress.add_task(self._describe(), total=total, completed=sum(self._steps.values()))
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressView:
        self._progress.start()
        self._say(f"{self._ended} of {self._count} runs are there, {self._count - self._ended} to do")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, run: PlannedRun) -> None:
        """Give a run its line."""
        self._lines[run.name] = self._progress.add_task(f"  {run.name}", total=run.config.total_steps)

    def update(self, run: PlannedRun, steps: int) -> None:
        """Show how many steps a run has trained."""
        self._steps[run.name] = min(steps, run.config.total_steps)
        self._progress.update(self._lines[run.name], completed=self._steps[run.name])
        self._progress.update(self._whole, completed=sum(self._steps.values()))

    def end(self, run: PlannedRun, how: str, *, finished: bool = True) -> None:
        """Take the line of a run away and say how it ended; one that is not `finished` is not counted."""
        self._progress.remove_task(self._lines.pop(run.name))
        if finished:
            self._ended += 1
            self._failed += how != "done"
            self._steps[run.name] = run.config.total_steps
        self._progress.update(self._whole, completed=sum(self._steps.values()), description=self._describe())
        self._say(f"[{self._ended}/{self._count}] {run.name} {how}")

    def _describe(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._ended}/{self._count} runs{failed}"

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
