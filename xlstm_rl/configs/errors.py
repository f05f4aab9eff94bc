"""What a wrong configuration raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value, its source and the remedy."""


def nearest(word: str, known: Iterable[str], unlisted: Iterable[str] = ()) -> str:
    """A hint at the word closest to `word`, or at all those known when none is close; too many go `unlisted`."""
    words = sorted(known)
    matches = difflib.get_close_matches(word, [*words, *unlisted], n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(words)}"
