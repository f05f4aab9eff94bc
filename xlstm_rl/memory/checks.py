"""Checks of settings, whose messages name the setting, the value met and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        TypeError: it is of another kind; 64.0 and True are.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be a whole number of at least {least}")
    if int(value) < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse what is no finite number, or lies outside of the bounds.

    Args:
        name: of the setting.
        value: met.
        least: smallest allowed value, None for no such bound.
        above: largest value too small, None for no such bound.
        below: smallest value too large, None for no such bound.
        most: largest allowed value, None for no such bound.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite, NaN or out of bounds.
    """
    bounds = {"of at least": least, "greater than": above, "less than": below, "at most": most}
    allowed = ["a finite number", *(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)]
    message = f"{name}={value!r} must be {' '.join(allowed[:2])}{''.join(f' and {part}' for part in allowed[2:])}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    number = float(value)
    too_small = (least is not None and number < least) or (above is not None and number <= above)
    too_large = (below is not None and number >= below) or (most is not None and number > most)
    if not math.isfinite(number) or too_small or too_large:
        raise ValueError(message)


def check_pair(name: str, value: object) -> None:
    """Refuse what is no tuple of two finite numbers.

    Raises:
        TypeError: it is of another kind or length.
        ValueError: one of the numbers is infinite or NaN.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name}={value!r} must be a pair of finite numbers, first and last, such as (3.0, 6.0)")
    for index, item in enumerate(value):
        check_number(f"{name}[{index}]", item)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be true or false")


def check_word(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a word that is not among the allowed ones.

    Raises:
        TypeError: it is no word.
        ValueError: it is another one.
    """
    words = ", ".join(repr(word) for word in allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a word, one of {words}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {words}")
