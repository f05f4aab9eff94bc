"""Checks of environment parameters."""

import math
import operator

RENDER_MODES = ("ansi", "rgb_array")


def whole_number(name: str, value: int, *, at_least: int, at_most: int | None = None) -> int:
    """`value` as an int.

    Raises:
        TypeError: `value` is not a whole number.
        ValueError: `value` is outside `at_least..at_most`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}") from None
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {number}")
    return number


def real_number(name: str, value: float, *, at_least: float, at_most: float = math.inf) -> float:
    """`value` as a float.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not finite or outside `at_least..at_most`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}") from None
    if not (math.isfinite(number) and at_least <= number <= at_most):
        raise ValueError(f"{name} must be finite and in {at_least}..{at_most}, got {number}")
    return number


def known_render_mode(render_mode: str | None) -> str | None:
    """`render_mode` itself; raises ValueError unless it is None or one of RENDER_MODES."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode must be None or one of {RENDER_MODES}, got {render_mode!r}")
    return render_mode
