"""The mLSTM block: matrix memory inside an up-projection (Beck et al. 2024, figure 10, eq. 19-27)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import MLSTMState, mlstm_sequence
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.fast import CompiledMLSTM, FastBlock, stands_for
from xlstm_rl.memory.layers import BlockLinear, CausalConv, HeadNorm, Linear, init_small, init_wang, soft_cap


class MLSTMBlockState(NamedTuple):
    """State of an mLSTM block."""

    cell: MLSTMState
    window: Tensor
    """The last inputs of the convolution, [B, conv_kernel - 1, inner]."""


@stands_for
class MLSTMBlock(FastBlock):
    """Residual block around an mLSTM cell: norm, up-projection, conv, q, k, v, cell, norm, skip, gate, down-projection.

    Args:
        config: the stack's configuration.
        index: position in the stack (unused: every mLSTM block starts alike).
    """

    compiled: CompiledMLSTM

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, inner, heads = config.hidden_size, config.inner_size, config.num_heads
        num_blocks = len(config.blocks)
        self.config = config
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.up = Linear(width, 2 * inner, bias=config.bias)
        self.conv = (
            CausalConv(inner, config.conv_kernel, identity=config.init == "recall") if config.conv_kernel else None
        )
        self.query_key = BlockLinear(inner, inner // config.qkv_block_size, num_maps=2, bias=config.bias)
        self.value = BlockLinear(inner, inner // config.qkv_block_size, bias=config.bias)
        self.gates = nn.Linear(3 * inner, 2 * heads)
        self.head_norm = HeadNorm(heads, inner // heads, config.norm_eps)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = Linear(inner, width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        for weight in (self.up.weight, self.query_key.weight, self.value.weight):
            init_small(weight, width)
        if config.init == "recall":
            _equal_queries_and_keys(self.query_key)
        init_wang(self.down.weight, width, num_blocks)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[:heads].normal_(0, 0.1)
            self.gates.bias[heads:].copy_(torch.linspace(*config.mlstm_forget_bias, heads))
            if config.bias:
                self.up.bias.zero_()
                self.down.bias.zero_()
        self.compiled = CompiledMLSTM(self, config, MLSTMBlockState)

    def initial_state(self, batch_size: int) -> MLSTMBlockState:
        """The empty state of `batch_size` rows."""
        inner, heads = self.config.inner_size, self.config.num_heads
        zeros = self.up.weight.new_zeros
        head_width = inner // heads
        cell = MLSTMState(
            zeros(batch_size, heads, head_width, head_width),
            zeros(batch_size, heads, head_width),
            zeros(batch_size, heads),
        )
        return MLSTMBlockState(cell, zeros(batch_size, max(self.config.conv_kernel - 1, 0), inner))

    def forward(self, x: Tensor, state: MLSTMBlockState, reset: Tensor | None = None) -> tuple[Tensor, MLSTMBlockState]:
        """See `MemoryBlock.forward`."""
        inner = self.up(self.norm(x))
        hidden, state = self.compiled.mix(self, inner, state, reset) or self._mix(inner, state, reset)
        return x + self.dropout(self.down(hidden)), state

    def _mix(self, x: Tensor, state: MLSTMBlockState, reset: Tensor | None) -> tuple[Tensor, MLSTMBlockState]:
        """All between the projections, layer by layer: x [B, T, 2 inner] -> [B, T, inner], state."""
        config = self.config
        heads = (config.num_heads, config.inner_size // config.num_heads)
        inner, output_gate = x.chunk(2, dim=-1)
        window, mixed = state.window, inner
        if self.conv is not None:
            mixed, window = self.conv(inner, window, reset)
            mixed = F.silu(mixed)
        query, key = self.query_key(mixed)
        (value,) = self.value(inner)
        gates = soft_cap(self.gates(torch.cat((query, key, value), dim=-1)), config.gate_soft_cap)
        input_gate, forget_gate = gates.chunk(2, dim=-1)
        if config.input_activation == "sigmoid":
            # the kernel takes the exponential of what it is given
            input_gate = F.logsigmoid(input_gate)
        hidden, cell = mlstm_sequence(
            query.unflatten(-1, heads),
            key.unflatten(-1, heads),
            value.unflatten(-1, heads),
            input_gate,
            forget_gate,
            state.cell,
            reset,
            forget_activation=config.forget_activation,
        )
        hidden = self.head_norm(hidden) + self.skip * mixed
        return hidden * F.silu(output_gate), MLSTMBlockState(cell, window)


@torch.no_grad()
def _equal_queries_and_keys(projection: BlockLinear) -> None:
    """Random maps that keep the scale of their input, the same for the queries as for the keys.

    Equal inputs then have the greatest products from the start: what was written is read where it shows again.
    """
    weight = projection.weight  # [groups, 2 * width, width]
    width = weight.shape[-1]
    nn.init.normal_(weight, std=width**-0.5)
    weight[:, width:] = weight[:, :width]
