"""The sLSTM block: scalar memory with memory mixing, then a gated FFN (Beck et al. 2024, figure 9, eq. 8-18)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import SLSTMState, slstm_sequence
from xlstm_rl.kernels.linear import linear
from xlstm_rl.kernels.tracing import traced
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.fast import CompiledSLSTM, FastBlock, stands_for
from xlstm_rl.memory.layers import BlockLinear, CausalConv, GatedFeedForward, HeadNorm, init_small


class SLSTMBlockState(NamedTuple):
    """State of an sLSTM block."""

    cell: SLSTMState
    window: Tensor
    """The last inputs of the convolution, [B, conv_kernel - 1, width]."""


@stands_for
class SLSTMBlock(FastBlock):
    """Residual block around an sLSTM cell: norm, conv, gates, cell, norm; then norm and feed-forward.

    Args:
        config: the stack's configuration.
        index: position in the stack, which sets the forget biases' power law.
    """

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, heads, num_blocks = config.hidden_size, config.slstm_heads, len(config.blocks)
        head_width = width // heads
        self.config = config
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.conv = (
            CausalConv(width, config.slstm_conv, identity=config.init == "recall") if config.slstm_conv else None
        )
        self.input_forget = BlockLinear(width, heads, num_maps=2)
        self.cell_output = BlockLinear(width, heads, num_maps=2)
        self.gate_bias = nn.Parameter(torch.zeros(4, heads, head_width))
        self.recurrent = nn.Parameter(torch.zeros(4, heads, head_width, head_width))
        self.head_norm = HeadNorm(heads, head_width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn_norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False) if config.ffn_size else None
        self.ffn = GatedFeedForward(width, config.ffn_size, num_blocks, bias=config.bias) if config.ffn_size else None
        init_small(self.input_forget.weight, width)
        init_small(self.cell_output.weight, width)
        nn.init.normal_(self.recurrent, std=config.recurrent_std / head_width**0.5)
        with torch.no_grad():
            self.gate_bias[1].copy_(_forget_bias(config, index, head_width))
        self.compiled = CompiledSLSTM(self, config, SLSTMBlockState)

    def initial_state(self, batch_size: int) -> SLSTMBlockState:
        """The empty state of `batch_size` rows."""
        width, heads = self.config.hidden_size, self.config.slstm_heads
        zeros = self.recurrent.new_zeros
        cell = SLSTMState(*(zeros(batch_size, heads, width // heads) for _ in SLSTMState._fields))
        return SLSTMBlockState(cell, zeros(batch_size, max(self.config.slstm_conv - 1, 0), width))

    def forward(self, x: Tensor, state: SLSTMBlockState, reset: Tensor | None = None) -> tuple[Tensor, SLSTMBlockState]:
        """See `MemoryBlock.forward`."""
        normed = self.norm(x)
        window, mixed = state.window, normed
        if self.conv is not None:
            mixed, window = self.conv(normed, window, reset)
            mixed = F.silu(mixed)
        hidden, cell = slstm_sequence(
            self._gates(normed, mixed),
            self.recurrent,
            state.cell,
            reset,
            forget_activation=self.config.forget_activation,
        )
        x = x + self.dropout(self.head_norm(hidden))
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, SLSTMBlockState(cell, window)

    def _gates(self, normed: Tensor, mixed: Tensor) -> Tensor:
        """Gates [B, T, 4, H, D] of what the convolution saw and gave, [B, T, width] each."""
        shape, heads = normed.shape[:2], self.gate_bias.shape[1:]
        if mixed is normed and heads[0] == 1 and not traced() and self.compiled.may_pass_by_layers(self):
            # all four in one product, and in order
            weight = torch.cat((self.input_forget.weight[0], self.cell_output.weight[0]))
            return linear(normed, weight, self.gate_bias.flatten()).view(*shape, 4, *heads)
        gates = torch.cat((self.input_forget(mixed), self.cell_output(normed)))  # [4, B, T, width]
        return gates.view(4, *shape, *heads).permute(1, 2, 0, 3, 4) + self.gate_bias


def _forget_bias(config: XLSTMConfig, index: int, head_width: int) -> Tensor:
    """Initial forget biases [head_width] of the units of a head."""
    if config.slstm_forget_bias is not None:
        return torch.linspace(*config.slstm_forget_bias, head_width)
    ratio = index / (len(config.blocks) - 1) if len(config.blocks) > 1 else 0.0
    position = torch.arange(head_width) / max(head_width - 1, 1)
    return 5.0 - 12.0 * position ** (0.3 + 1.3 * ratio)
