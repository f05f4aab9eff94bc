"""Pictures and text of small tasks."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

CELL = 16

Picture = NDArray[np.uint8]


def draw(
    render_mode: str | None, text: Callable[[], str], brightness: Callable[[], NDArray[np.float32]]
) -> str | Picture | None:
    """What `render()` returns in the given mode.

    Args:
        render_mode: "ansi" for the text, "rgb_array" for the picture, None for nothing but a warning.
        text: Makes the text.
        brightness: Makes the cells of the picture, [H, W] in [0, 1].

    Returns:
        The text, the picture [H * CELL, W * CELL, 3] or None.
    """
    if render_mode is None:
        gym.logger.warn(
            "render() shows nothing without a render mode; make the environment with render_mode='ansi' or 'rgb_array'"
        )
        return None
    if render_mode == "ansi":
        return text()
    grey = (brightness() * 255).astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
    return np.stack([grey] * 3, axis=-1)
