"""Frames of an episode as an animated GIF."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xlstm_rl.agents.checkpoint import write_whole

LAST_FRAME_SECONDS = 1.0
# Pixels, below which frames are enlarged.
LEAST_WIDTH = 400


def write_gif(frames: Sequence[np.ndarray], path: Path, frames_per_second: float) -> None:
    """Write an animation that repeats; the last frame stays for a second.

    Args:
        frames: uint8 [height, width, 3] each, at least one.
        path: of the file; replaced whole.
        frames_per_second: players show at most about 50.
    """
    # Loaded here because most uses of the package never draw.
    from PIL import Image

    # whole multiples keep the edges of pixel worlds sharp
    scale = max(1, math.ceil(LEAST_WIDTH / frames[0].shape[1]))
    pictures = [Image.fromarray(frame.repeat(scale, axis=0).repeat(scale, axis=1)) for frame in frames]
    durations = [round(1000 / frames_per_second)] * (len(pictures) - 1) + [round(1000 * LAST_FRAME_SECONDS)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_whole(path, buffer.getvalue())
