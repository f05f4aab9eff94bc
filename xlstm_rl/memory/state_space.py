"""A selective diagonal state-space memory: linear recurrence with input-dependent decay, scanned in parallel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import causal_conv
from xlstm_rl.kernels.selective_scan import SelectiveInputs, selective_scan
from xlstm_rl.memory.config import check_number, check_pair, check_whole
from xlstm_rl.memory.core import MemoryCore


class StateSpaceState(NamedTuple):
    """State of a selective state-space block."""

    hidden: Tensor
    """[B, num_states, inner]"""
    window: Tensor
    """The last inputs of the convolution, [B, conv_kernel - 1, inner]."""


class StateSpace(MemoryCore):
    """Residual blocks of selective diagonal state spaces (Gu and Dao 2023, Mamba, section 3).

    In each block h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t and y_t = C_t h_t + D x_t, where delta, B and C are
    read from the convolved input and A < 0 is diagonal. An episode start empties h.

    Args:
        input_size: features per step.
        hidden_size: width of the residual stream and of the output.
        num_layers: blocks.
        num_states: states per inner feature, the N of the paper.
        proj_factor: inner width over `hidden_size`.
        conv_kernel: steps seen by the causal convolution, the current one included.
        delta_range: initial step sizes are spread log-uniformly between these two, hence time constants between 1 / the
            second and 1 / the first number in steps.

    Raises:
        TypeError: a setting is of the wrong kind; the message names it.
        ValueError: a setting has an impossible value; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        num_states: int = 8,
        proj_factor: float = 2.0,
        conv_kernel: int = 4,
        delta_range: tuple[float, float] = (0.001, 0.1),
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_states": num_states}
        for name, value in (sizes | {"conv_kernel": conv_kernel}).items():
            check_whole(name, value, 1)
        check_number("proj_factor", proj_factor, above=0)
        # YAML has lists only
        delta_range = tuple(delta_range) if isinstance(delta_range, list) else delta_range
        check_pair("delta_range", delta_range)
        low, high = delta_range
        check_number("delta_range", low, above=0)
        check_number("delta_range", high, least=low)
        self.input_size, self.output_size = input_size, hidden_size
        self.input_projection = nn.Linear(input_size, hidden_size)
        inner = math.ceil(proj_factor * hidden_size)
        self.shapes = ((num_states, inner), (conv_kernel - 1, inner))
        self.blocks = nn.ModuleList(
            _Block(hidden_size, inner, num_states, conv_kernel, (low, high)) for _ in range(num_layers)
        )
        self.post_norm = nn.RMSNorm(hidden_size)

    def initial_state(self, batch_size: int) -> tuple[StateSpaceState, ...]:
        """The empty state: zeros."""
        hidden, window = self.shapes
        return tuple(
            StateSpaceState(self._zeros(batch_size, *hidden), self._zeros(batch_size, *window)) for _ in self.blocks
        )

    def forward(
        self, x: Tensor, state: tuple[StateSpaceState, ...], reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[StateSpaceState, ...]]:
        """See `MemoryCore.forward`."""
        x = self.input_projection(x)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            x, block_state = block(x, block_state, reset)
            states.append(block_state)
        return self.post_norm(x), tuple(states)


class _Block(nn.Module):
    def __init__(
        self, width: int, inner: int, num_states: int, conv_kernel: int, delta_range: tuple[float, float]
    ) -> None:
        super().__init__()
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

    def forward(self, x: Tensor, state: StateSpaceState, reset: Tensor | None) -> tuple[Tensor, StateSpaceState]:
        """x [B, T, width], reset bool [B, T] or None -> [B, T, width], state."""
        inner, output_gate = self.up(self.norm(x)).chunk(2, dim=-1)
        inner, window = causal_conv(inner, self.conv, self.conv_bias, state.window, reset)
        inner = F.silu(inner)
        rank, write, read = self.select(inner).split((self.rank, self.num_states, self.num_states), dim=-1)
        delta = F.softplus(self.delta(rank))
        inputs = SelectiveInputs(delta, inner, self.log_rates.exp(), write, read, state.hidden)
        y, last = selective_scan(inputs, reset)
        return x + self.down((y + self.skip * inner) * F.silu(output_gate)), StateSpaceState(last, window)
