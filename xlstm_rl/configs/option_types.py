"""Numbers on the command line, refused with a message that says which are allowed."""

from __future__ import annotations

import argparse
import math

MOST = 1e9


def positive(text: str) -> int:
    """As `type` of an argument: a whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """As `type` of an argument: a whole number of at least 0."""
    return _at_least(0, text)


def amount(text: str) -> float:
    """As `type` of an argument: a number of at least 0 and below `MOST`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < MOST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0 and below {MOST:g}")
    return value


def _at_least(lowest: int, text: str) -> int:
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}")
    return int(text)
