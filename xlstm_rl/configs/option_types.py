"""Whole numbers on the command line, refused with a message that says which are allowed."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """As `type` of an argument: a whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """As `type` of an argument: a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}")
    return int(text)
