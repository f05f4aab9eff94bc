"""The sLSTM block: scalar memory with memory mixing, then a gated FFN (Beck et al. 2024, figure 9, eq. 8-18)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import SLSTMState, slstm_sequence
from xlstm_rl.kernels.cpp_blocks import Place, SLSTMOptions, SLSTMSizes, StepPlan, slstm_plan
from xlstm_rl.memory.block import Block
from xlstm_rl.memory.layers import (
    BlockLinear,
    CausalConv,
    GatedFeedForward,
    HeadNorm,
    has_no_more_than_weights,
    init_small,
    parameters_of,
)

if TYPE_CHECKING:
    from xlstm_rl.memory.xlstm import XLSTMConfig


class SLSTMBlockState(NamedTuple):
    """State of an sLSTM block."""

    cell: SLSTMState
    window: Tensor
    """The last inputs of the convolution, [B, conv_kernel - 1, width]."""


class SLSTMBlock(Block):
    """Residual block around an sLSTM cell: norm, conv, gates, cell, norm; then norm and feed-forward.

    Args:
        config: the stack's configuration.
        index: position in the stack, which sets the forget biases' power law.
    """

    kind = "slstm_block_step"
    state_types = (SLSTMBlockState, SLSTMState)

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
        self._options = SLSTMOptions(config.norm_eps, config.forget_activation)
        self._sizes = SLSTMSizes(width, heads, config.ffn_size, config.slstm_conv)
        self._layer_types = tuple(map(type, self._layers()))

    def initial_state(self, batch_size: int) -> SLSTMBlockState:
        """The empty state of `batch_size` rows."""
        width, heads = self.config.hidden_size, self.config.slstm_heads
        zeros = self.recurrent.new_zeros
        cell = SLSTMState(*(zeros(batch_size, heads, width // heads) for _ in SLSTMState._fields))
        return SLSTMBlockState(cell, zeros(batch_size, max(self.config.slstm_conv - 1, 0), width))

    def forward(
        self, x: Tensor, state: SLSTMBlockState, reset: Tensor | None, *, reuse_state: bool = False
    ) -> tuple[Tensor, SLSTMBlockState]:
        """x [B, T, width], reset bool [B, T] or None -> [B, T, width], state; `reuse_state`: see `MemoryCore.step`."""
        if x.shape[1] == 1:
            stepped = self._compiled_step(x, state, reset, reuse_state)
            if stepped is not None:
                return stepped
        normed = self.norm(x)
        window, mixed = state.window, normed
        if self.conv is not None:
            mixed, window = self.conv(normed, window, reset)
            mixed = F.silu(mixed)
        gates = torch.cat((self.input_forget(mixed), self.cell_output(normed)))  # [4, B, T, width]
        gates = gates.view(4, *x.shape[:2], *self.gate_bias.shape[1:]).permute(1, 2, 0, 3, 4) + self.gate_bias
        hidden, cell = slstm_sequence(
            gates, self.recurrent, state.cell, reset, forget_activation=self.config.forget_activation
        )
        x = x + self.dropout(self.head_norm(hidden))
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, SLSTMBlockState(cell, window)

    def _layers(self) -> tuple[nn.Module | None, ...]:
        """All layers, those of the feed-forward network last."""
        ffn = self._modules.get("ffn")
        return (*self._modules.values(), *(() if ffn is None else ffn._modules.values()))

    def _make_plan(self) -> StepPlan | None:
        places = self._places()
        return None if places is None else slstm_plan(self._sizes, self._options, places)

    def _places(self) -> list[Place] | None:
        """Where the weights are, in the order of `SLSTMWeights`; None if layers were replaced or parametrized."""
        layers: dict[str, Any] = self._modules
        if tuple(map(type, self._layers())) != self._layer_types:
            return None
        bare = [layers.get(name) for name in ("norm", "input_forget", "cell_output", "head_norm", "ffn_norm")]
        if not has_no_more_than_weights(filter(None, bare), self._options.epsilon):
            return None
        ffn = layers.get("ffn")
        up, down = (None, None) if ffn is None else (ffn._modules["up"], ffn._modules["down"])
        return [
            (layers["norm"]._parameters, "weight"),
            *parameters_of(layers.get("conv")),
            (layers["input_forget"]._parameters, "weight"),
            (layers["cell_output"]._parameters, "weight"),
            (self._parameters, "gate_bias"),
            (self._parameters, "recurrent"),
            (layers["head_norm"]._parameters, "weight"),
            parameters_of(layers.get("ffn_norm"))[0],
            *parameters_of(up),
            *parameters_of(down),
        ]


def _forget_bias(config: XLSTMConfig, index: int, head_width: int) -> Tensor:
    """Initial forget biases [head_width] of the units of a head."""
    if config.slstm_forget_bias is not None:
        return torch.linspace(*config.slstm_forget_bias, head_width)
    ratio = index / (len(config.blocks) - 1) if len(config.blocks) > 1 else 0.0
    position = torch.arange(head_width) / max(head_width - 1, 1)
    return 5.0 - 12.0 * position ** (0.3 + 1.3 * ratio)
