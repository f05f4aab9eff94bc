"""What is in the memory, drawn beside every frame that an environment draws."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

# Steps that are seen at a time, and pixels.
SHOWN, WIDTH, LEAST_HEIGHT, LINE = 100, 240, 200, 12
_INK, _GREY = (31, 119, 180), (90, 90, 90)


class MemoryPanel(gym.Wrapper[Any, Any, Any, Any]):
    """Draws the size of every part of a memory over the last steps to the right of what the environment draws.

    Args:
        env: draws "rgb_array".
        sizes: called before every frame: the size of every part of the memory by name; empty before the first step.
    """

    def __init__(self, env: gym.Env[Any, Any], sizes: Callable[[], Mapping[str, float]]) -> None:
        super().__init__(env)
        self._sizes = sizes
        self._past: deque[Mapping[str, float]] = deque(maxlen=SHOWN)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """See `gymnasium.Env.reset`."""
        self._past.clear()
        return super().reset(**kwargs)

    def render(self) -> Any:
        """Uint8 [height, width, 3]."""
        frame = np.asarray(super().render())
        if sizes := self._sizes():
            self._past.append(dict(sizes))
        height = max(LEAST_HEIGHT, frame.shape[0])
        scale = max(1, height // frame.shape[0])
        large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
        whole = np.full((height, large.shape[1] + WIDTH, 3), 255, np.uint8)
        whole[: large.shape[0], : large.shape[1]] = large
        whole[:, large.shape[1] :] = self._draw(height)
        return whole

    def _draw(self, height: int) -> np.ndarray:
        # Loaded here because most uses of the package never draw.
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (WIDTH, height), (255, 255, 255))
        pen = ImageDraw.Draw(picture)
        names = list(self._past[-1]) if self._past else []
        for index, name in enumerate(names):
            top, bottom = (round(height * (index + edge) / len(names)) for edge in (0, 1))
            values = np.array([past[name] for past in self._past if name in past])
            pen.text((4, top), f"{name} {values[-1]:.2g}", fill=_GREY)
            low, high = values.min(), max(values.max(), values.min() + 1e-9)
            across = np.arange(len(values)) * (WIDTH - 8) / (SHOWN - 1) + 4
            room = max(bottom - top - LINE - 4, 1)
            down = bottom - 3 - (values - low) / (high - low) * room
            points = [(float(x), float(y)) for x, y in zip(across, down, strict=True)]
            pen.line(points if len(points) > 1 else points * 2, fill=_INK, width=1)
        return np.asarray(picture)
