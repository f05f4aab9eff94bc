"""Blocks whose recurrence is linear and acts on each feature alone: selective state spaces, and RWKV-4."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import causal_conv
from xlstm_rl.kernels.selective_scan import SelectiveInputs, selective_scan
from xlstm_rl.kernels.states import zero_where
from xlstm_rl.kernels.wkv import WKVState, wkv_sequence
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.core import MemoryBlock
from xlstm_rl.memory.layers import init_small, init_wang
from xlstm_rl.memory.state import contained

# Of the authors' models.
RWKV_FFN_FACTOR = 4.0


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


class RWKVState(NamedTuple):
    """State of an RWKV-4 block."""

    sums: WKVState
    """Of the time mixing."""
    time_input: Tensor
    """What entered the time mixing in the step before, [B, width]; zeros where an episode starts."""
    channel_input: Tensor
    """The same of the channel mixing."""


class RWKVBlock(MemoryBlock):
    """Residual block of RWKV-4 (Peng et al. 2023, section 3): time mixing, then channel mixing.

    Both see a learnt mixture of the step's input and of that of the step before. Time mixing averages values with
    weights that decay at a rate of each feature, whatever the input; channel mixing is a gated feed-forward network of
    squared rectifiers. Initial decays, bonuses and mixtures are those of the authors' code, spread over features and
    blocks.

    Args:
        width: of input and output.
        ffn_factor: inner width of the channel mixing over `width`.
        index: place in the stack, from 0.
        num_blocks: in the stack.
    """

    def __init__(self, width: int, ffn_factor: float, index: int, num_blocks: int) -> None:
        super().__init__()
        inner = round(ffn_factor * width)
        self.time_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.time_receptance, self.time_key, self.time_value, self.time_output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.channel_receptance = nn.Linear(width, width, bias=False)
        self.channel_key = nn.Linear(width, inner, bias=False)
        self.channel_value = nn.Linear(inner, width, bias=False)
        for layer in (self.time_receptance, self.time_key, self.time_value, self.channel_receptance, self.channel_key):
            init_small(layer.weight, width)
        for layer in (self.time_output, self.channel_value):
            init_wang(layer.weight, width, num_blocks)
        feature = torch.arange(width) / max(width - 1, 1)
        depth = index / max(num_blocks - 1, 1)  # 0 in the first block, 1 in the last
        self.log_decay = nn.Parameter(-5.0 + 8.0 * feature ** (0.7 + 1.3 * depth))
        # in turn, so that features with equal decays differ
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(width) + 1) % 3 - 1))
        share = (torch.arange(width) / width) ** (1.0 - index / num_blocks)
        self.time_mix = nn.Parameter(torch.stack((0.5 * share, share, share + 0.3 * depth)))  # receptance, key, value
        self.channel_mix = nn.Parameter(torch.stack((share, share)))  # receptance, key

    def initial_state(self, batch_size: int) -> RWKVState:
        """The empty state: zeros."""
        zeros = self.log_decay.new_zeros
        width = len(self.log_decay)
        sums, first, second = WKVState(*(zeros(batch_size, width) for _ in range(3))), *(zeros(batch_size, width),) * 2
        return RWKVState(sums, first, second)

    def forward(self, x: Tensor, state: RWKVState, reset: Tensor | None = None) -> tuple[Tensor, RWKVState]:
        """See `MemoryBlock.forward`."""
        return contained(self._run, x, state, reset) if x.shape[1] else (x, state)

    def _run(self, x: Tensor, state: RWKVState, reset: Tensor | None) -> tuple[Tensor, RWKVState]:
        entered = self.time_norm(x)
        before = _step_before(entered, state.time_input, reset)
        to_receptance, to_key, to_value = (torch.lerp(before, entered, mix) for mix in self.time_mix)
        average, sums = wkv_sequence(
            self.time_key(to_key), self.time_value(to_value), self.log_decay.exp(), self.bonus, state.sums, reset
        )
        x = x + self.time_output(torch.sigmoid(self.time_receptance(to_receptance)) * average)
        mixed = self.channel_norm(x)
        before = _step_before(mixed, state.channel_input, reset)
        to_receptance, to_key = (torch.lerp(before, mixed, mix) for mix in self.channel_mix)
        value = self.channel_value(F.relu(self.channel_key(to_key)).square())
        x = x + torch.sigmoid(self.channel_receptance(to_receptance)) * value
        return x, RWKVState(sums, entered[:, -1], mixed[:, -1])


def _step_before(x: Tensor, last: Tensor, reset: Tensor | None) -> Tensor:
    """x [B, T, D] one step later, `last` [B, D] first; zeros where an episode starts."""
    before = torch.cat((last[:, None], x[:, :-1]), 1)
    return before if reset is None else zero_where(reset, before)


def rwkv_block(config: XLSTMConfig, index: int) -> RWKVBlock:
    """The block of the letter "r"."""
    return RWKVBlock(config.hidden_size, RWKV_FFN_FACTOR, index, len(config.blocks))
