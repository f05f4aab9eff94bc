"""How a run is shown while it goes on: one updating line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

PLAIN_SECONDS = 5.0
# What takes longer says how far it is.
PATIENCE_SECONDS = 3.0


class SignOfLife:
    """Says every few seconds how far an evaluation is; called after each of its steps.

    Args:
        console: where to print.
        what: is evaluated.
        n_episodes: to finish.
        check: called first, to end the evaluation by an exception.
    """

    def __init__(
        self, console: Console, what: str, n_episodes: int, check: Callable[[], object] = lambda: None
    ) -> None:
        self._console, self._what, self._n_episodes, self._check = console, what, n_episodes, check
        self._begun = self._last = time.monotonic()

    def __call__(self, finished: int, steps: int) -> None:
        """Take note of a step.

        Args:
            finished: episodes until now.
            steps: of each environment until now.
        """
        self._check()
        now = time.monotonic()
        if now - self._last >= PATIENCE_SECONDS:
            self._last = now
            left = (
                ""
                if not finished
                else f", at most {_clock((now - self._begun) * (self._n_episodes / finished - 1))} left"
            )
            say(
                self._console,
                f"evaluating {self._what}: {finished} of {self._n_episodes} episodes, step {steps:,}{left}",
            )


class LastingConsole(Console):
    """A console whose reader may go away, as in `xlstm-rl train ... | head -1`: what is done goes on unseen."""

    def on_broken_pipe(self) -> None:
        """Print no more, and say so once where errors go."""
        self.quiet = True
        drop_output()
        with contextlib.suppress(OSError):
            print("xlstm-rl: nobody reads the output any more; it goes on without", file=sys.stderr, flush=True)


def drop_output() -> None:
    """Let everything that is printed from now on go nowhere, also what waits to be printed."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(console: Console, text: str) -> None:
    """Print a line as it is, in whatever characters the console has."""
    console.print(printable(console, text), highlight=False, soft_wrap=True, markup=False)


def printable(console: Console, text: str) -> str:
    """The text, with numbers in place of characters that the console does not have."""
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


class LiveView:
    """Shows return, success rate, steps per second and time left; a context manager.

    Args:
        total_steps: steps of the whole run.
        console: where to print; on a terminal one line updates in place, elsewhere a line comes every few seconds.
        first_step: where a resumed run goes on.
    """

    def __init__(self, total_steps: int, console: Console, first_step: int = 0) -> None:
        self._total_steps, self._first_step = total_steps, first_step
        self._console = console
        self._started = time.monotonic()
        self._last_plain = float("-inf")
        self._progress = Progress(
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, text="")

    def __enter__(self) -> LiveView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, mean_return: float | None, success: float | None) -> None:
        """Show the state after `step` steps; None where nothing is known yet."""
        text = self._describe(step, mean_return, success)
        if self._console.is_terminal:
            self._progress.update(self._task, completed=min(step, self._total_steps), text=text)
        elif time.monotonic() - self._last_plain >= PLAIN_SECONDS or step >= self._total_steps:
            self._last_plain = time.monotonic()
            self.say(f"{step:>9,} / {self._total_steps:,} steps  {text}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        say(self._console, text)

    def _describe(self, step: int, mean_return: float | None, success: float | None) -> str:
        speed = (step - self._first_step) / max(time.monotonic() - self._started, 1e-9)
        left = max(self._total_steps - step, 0) / max(speed, 1e-9)
        parts = [
            "return -" if mean_return is None else f"return {mean_return:.2f}",
            "" if success is None else f"success {success:.2f}",
            f"{speed:,.0f} steps/s",
            f"{_clock(left)} left",
        ]
        return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
