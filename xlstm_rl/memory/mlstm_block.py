"""The mLSTM block: matrix memory inside an up-projection (Beck et al. 2024, figure 10, eq. 19-27)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import MLSTMState, mlstm_sequence
from xlstm_rl.kernels.cpp_blocks import MLSTMOptions, MLSTMSizes, MLSTMWeights, Place, StepPlan, mlstm_plan
from xlstm_rl.kernels.cpp_mixer import can_mix, mlstm_mixer
from xlstm_rl.memory.block import Block
from xlstm_rl.memory.layers import (
    BlockLinear,
    CausalConv,
    HeadNorm,
    has_no_more_than_weights,
    init_small,
    init_wang,
    parameters_of,
    soft_cap,
)

if TYPE_CHECKING:
    from xlstm_rl.memory.xlstm import XLSTMConfig


class MLSTMBlockState(NamedTuple):
    """State of an mLSTM block."""

    cell: MLSTMState
    window: Tensor
    """The last inputs of the convolution, [B, conv_kernel - 1, inner]."""


class MLSTMBlock(Block):
    """Residual block around an mLSTM cell: norm, up-projection, conv, q, k, v, cell, norm, skip, gate, down-projection.

    Args:
        config: the stack's configuration.
        index: position in the stack (unused: every mLSTM block starts alike).
    """

    kind = "mlstm_block_step"
    state_types = (MLSTMBlockState, MLSTMState)

    def __init__(self, config: XLSTMConfig, index: int) -> None:
        super().__init__()
        width, inner, heads = config.hidden_size, config.inner_size, config.num_heads
        num_blocks = len(config.blocks)
        self.config = config
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.up = nn.Linear(width, 2 * inner, bias=config.bias)
        self.conv = (
            CausalConv(inner, config.conv_kernel, identity=config.init == "recall") if config.conv_kernel else None
        )
        self.query_key = BlockLinear(inner, inner // config.qkv_block_size, num_maps=2, bias=config.bias)
        self.value = BlockLinear(inner, inner // config.qkv_block_size, bias=config.bias)
        self.gates = nn.Linear(3 * inner, 2 * heads)
        self.head_norm = HeadNorm(heads, inner // heads, config.norm_eps)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, width, bias=config.bias)
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
        self._options = MLSTMOptions(
            config.norm_eps, config.gate_soft_cap, config.forget_activation, config.input_activation == "sigmoid"
        )
        self._sizes = MLSTMSizes(width, inner, heads, config.qkv_block_size, config.conv_kernel)
        self._layer_types = tuple(map(type, self._modules.values()))

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

    def forward(
        self, x: Tensor, state: MLSTMBlockState, reset: Tensor | None, *, reuse_state: bool = False
    ) -> tuple[Tensor, MLSTMBlockState]:
        """x [B, T, width], reset bool [B, T] or None -> [B, T, width], state; `reuse_state`: see `MemoryCore.step`."""
        if x.shape[1] == 1:
            stepped = self._compiled_step(x, state, reset, reuse_state)
            if stepped is not None:
                return stepped
        inner = self.up(self.norm(x))
        mixed = self._compiled_mix(inner, state, reset) if can_mix(inner) else None
        hidden, state = self._mix(inner, state, reset) if mixed is None else mixed
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

    def _compiled_mix(
        self, x: Tensor, state: MLSTMBlockState, reset: Tensor | None
    ) -> tuple[Tensor, MLSTMBlockState] | None:
        weights = self._weights()
        if weights is None:
            return None
        mixed = mlstm_mixer(x, weights, self._sizes, state.cell, state.window, reset, self._options)
        if mixed is None:
            return None
        hidden, cell, window = mixed
        return hidden, MLSTMBlockState(cell, window)

    def _weights(self) -> MLSTMWeights | None:
        """The weights, or None if layers were replaced or parametrized, so that weights alone do not tell."""
        try:
            return MLSTMWeights(*(held[name] for held, name in self._places() or ()))  # type: ignore[arg-type]
        # weights that pruning or a parametrization has put elsewhere; or no places
        except (KeyError, TypeError):
            return None

    def _make_plan(self) -> StepPlan | None:
        places = self._places()
        return None if places is None else mlstm_plan(self._sizes, self._options, places)

    def _places(self) -> list[Place] | None:
        """Where the weights are, in the order of `MLSTMWeights`."""
        layers: dict[str, Any] = self._modules
        if tuple(map(type, layers.values())) != self._layer_types:
            return None
        if not has_no_more_than_weights((layers["norm"], layers["head_norm"]), self._options.epsilon):
            return None
        return [
            (layers["norm"]._parameters, "weight"),
            *parameters_of(layers["up"]),
            *parameters_of(layers.get("conv")),
            *parameters_of(layers["query_key"]),
            *parameters_of(layers["value"]),
            *parameters_of(layers["gates"]),
            (layers["head_norm"]._parameters, "weight"),
            (self._parameters, "skip"),
            *parameters_of(layers["down"]),
        ]


@torch.no_grad()
def _equal_queries_and_keys(projection: BlockLinear) -> None:
    """Random maps that keep the scale of their input, the same for the queries as for the keys.

    Equal inputs then have the greatest products from the start: what was written is read where it shows again.
    """
    weight = projection.weight  # [groups, 2 * width, width]
    width = weight.shape[-1]
    nn.init.normal_(weight, std=width**-0.5)
    weight[:, width:] = weight[:, :width]
