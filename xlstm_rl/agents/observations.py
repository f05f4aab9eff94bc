"""Observations are an array, or a dict of arrays: one function for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def map_obs(function: Callable[..., Any], obs: Any, *others: Any) -> Any:
    """Apply `function` to an observation, or to every entry of a dict.

    Args:
        function: receives one entry of each observation.
        obs: an array, a tensor, a space or the like; or a dict of those.
        *others: further observations with the same keys.
    """
    if isinstance(obs, dict):
        return {key: function(part, *(other[key] for other in others)) for key, part in obs.items()}
    return function(obs, *others)


def entries(obs: Any) -> Iterator[tuple[str | None, Any]]:
    """The entries of an observation and their keys; one that is no dict has the key None."""
    yield from obs.items() if isinstance(obs, dict) else [(None, obs)]


def rows_of(obs: Any) -> int:
    """Number of rows of observations [n, ...]."""
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
