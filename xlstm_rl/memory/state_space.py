"""A selective diagonal state-space block: a linear recurrence with input-dependent decay."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import causal_conv
from xlstm_rl.kernels.selective_scan import SelectiveInputs, selective_scan
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.core import MemoryBlock
from xlstm_rl.memory.state import contained


class StateSpaceState(NamedTuple):
    """State of a selective state-space block."""

    hidden: Tensor
    """[B, num_states, inner]"""
    window: Tensor
    """The last inputs of the convolution, [B, conv_kernel - 1, inner]."""


class StateSpaceBlock(MemoryBlock):
    """Residual block of selective diagonal state spaces (Gu and Dao 2023, Mamba, section 3).

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t and y_t = C_t h_t + D x_t, where delta, B and C are read from the
    convolved input and A < 0 is diagonal. An episode start empties h.

    Args:
        width: of input and output.
        proj_factor: inner width over `width`.
        num_states: states per inner feature, the N of the paper.
        conv_kernel: steps seen by the causal convolution, the current one included; at least 1.
        delta_range: initial step sizes are spread log-uniformly between these two, hence time constants between 1 / the
            second and 1 / the first number in steps.
    """

    def __init__(
        self,
        width: int,
        proj_factor: float,
        num_states: int,
        conv_kernel: int,
        delta_range: tuple[float, float] = (0.001, 0.1),
    ) -> None:
        super().__init__()
        inner = math.ceil(proj_factor * width)
        self.num_states, self.rank = num_states, math.ceil(width / 16)
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        bound = conv_kernel**-0.5
        self.conv = nn.Parameter(torch.empty(inner, conv_kernel).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.select = nn.Linear(inner, self.rank + 2 * num_states, bias=False)
        self.delta = nn.Linear(self.rank, inner)
        # S4D-real: decays -1, -2, ...
        self.log_rates = nn.Parameter(torch.arange(1, num_states + 1).float().log()[:, None].repeat(1, inner))
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, width, bias=False)
        low, high = (math.log(value) for value in delta_range)
        delta = (torch.rand(inner) * (high - low) + low).exp()
        with torch.no_grad():
            # the inverse of softplus
            self.delta.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def initial_state(self, batch_size: int) -> StateSpaceState:
        """The empty state: zeros."""
        inner, taps = self.conv.shape
        zeros = self.conv.new_zeros
        return StateSpaceState(zeros(batch_size, self.num_states, inner), zeros(batch_size, taps - 1, inner))

    def forward(self, x: Tensor, state: StateSpaceState, reset: Tensor | None = None) -> tuple[Tensor, StateSpaceState]:
        """See `MemoryBlock.forward`."""
        return contained(self._run, x, state, reset)

    def _run(self, x: Tensor, state: StateSpaceState, reset: Tensor | None) -> tuple[Tensor, StateSpaceState]:
        inner, output_gate = self.up(self.norm(x)).chunk(2, dim=-1)
        inner, window = causal_conv(inner, self.conv, self.conv_bias, state.window, reset)
        inner = F.silu(inner)
        rank, write, read = self.select(inner).split((self.rank, self.num_states, self.num_states), dim=-1)
        delta = F.softplus(self.delta(rank))
        inputs = SelectiveInputs(delta, inner, self.log_rates.exp(), write, read, state.hidden)
        y, last = selective_scan(inputs, reset)
        return x + self.down((y + self.skip * inner) * F.silu(output_gate)), StateSpaceState(last, window)


def state_space_block(config: XLSTMConfig, index: int) -> StateSpaceBlock:
    """The block of the letter "d"."""
    return StateSpaceBlock(config.hidden_size, config.proj_factor, config.num_states, config.conv_kernel or 1)
