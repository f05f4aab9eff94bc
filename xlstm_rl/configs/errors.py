"""What a wrong configuration raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value, its source and the remedy."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word closest to `word`, or at all of them when none is close."""
    words = sorted(known)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(words)}"
