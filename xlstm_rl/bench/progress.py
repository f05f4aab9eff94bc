"""The live view of a benchmark: the whole, and a line for each run that is under way."""

from __future__ import annotations

from collections.abc import Container, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xlstm_rl.bench.plan import PlannedRun


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
