"""What a wrong configuration raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value, its source and the remedy."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """A hint at the word closest to `word`; None when none is close."""
    matches = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the word closest to `word`, or at all those known when none is close."""
    words = sorted(known)
    return closest(word, words) or f"known: {', '.join(words)}"
