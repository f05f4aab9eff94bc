"""Frame stacking as a memory core: a network that sees the last few steps side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xlstm_rl.memory.config import check_whole
from xlstm_rl.memory.core import MemoryCore


class Frames(NamedTuple):
    """State of a frame stack."""

    past: Tensor
    """The last inputs, [B, num_frames - 1, input_size], oldest first."""


class FrameStack(MemoryCore):
    """The last `num_frames` inputs of the episode through one hidden layer; earlier ones are zeros.

    Args:
        input_size: features per step.
        hidden_size: units of the layer.
        num_frames: steps seen, the current one included.

    Raises:
        TypeError: a setting is no whole number.
        ValueError: a setting is not positive.
    """

    def __init__(self, input_size: int, hidden_size: int = 64, num_frames: int = 4) -> None:
        super().__init__()
        check_whole("hidden_size", hidden_size, 1)
        check_whole("num_frames", num_frames, 1)
        self.input_size, self.output_size, self.num_frames = input_size, hidden_size, num_frames
        self.layer = nn.Sequential(nn.Linear(num_frames * input_size, hidden_size), nn.Tanh())

    def initial_state(self, batch_size: int) -> Frames:
        """Zeros."""
        return Frames(self._zeros(batch_size, self.num_frames - 1, self.input_size))

    def forward(self, x: Tensor, state: Frames, reset: Tensor | None = None) -> tuple[Tensor, Frames]:
        """See `MemoryCore.forward`."""
        past = self.num_frames - 1
        B, T = x.shape[:2]
        if T == 0:
            return x.new_zeros(B, 0, self.output_size), state
        if reset is None:
            reset = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        frames = torch.cat((state.past, x), 1)  # [B, past + T, input_size]
        episode = torch.cat((torch.zeros_like(reset[:, :1]).expand(-1, past), reset), 1).cumsum(1)
        same = episode.unfold(1, past + 1, 1) == episode[:, past:, None]  # [B, T, num_frames]
        stacked = frames.unfold(1, past + 1, 1).transpose(2, 3).masked_fill(~same[..., None], 0.0)
        kept = frames[:, T:].masked_fill((episode[:, T:] != episode[:, -1:])[..., None], 0.0)
        return self.layer(stacked.flatten(2)), Frames(kept)
