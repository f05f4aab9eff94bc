"""Ctrl-C and SIGTERM as a request to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any


class InterruptedEvaluationError(Exception):
    """Ends an evaluation after a request to stop; nobody outside of a run meets it."""


class Interruption(AbstractContextManager["Interruption"]):
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one acts as usual.

    Args:
        told: called with a line when the signal comes.

    Attributes:
        signal: the signal that came, None if none did.
    """

    def __init__(self, told: Callable[[str], object] = lambda text: None) -> None:
        self.signal: signal.Signals | None = None
        self._told = told
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        # Python lets only the main thread set handlers; elsewhere the caller of train keeps its own.
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `InterruptedEvaluationError` if there was a signal."""
        if self.signal is not None:
            raise InterruptedEvaluationError

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        self._told(f"{self.signal.name}: stopping as soon as this step is over; once more ends at once, unsaved")

    def _restore(self) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
