"""The xLSTM memory: a residual stack of mLSTM and sLSTM blocks (Beck et al. 2024, arXiv 2405.04517)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xlstm_rl.kernels.checks import check_reset
from xlstm_rl.kernels.cpp_blocks import can_step
from xlstm_rl.memory.block import Block, is_bare
from xlstm_rl.memory.checks import check_flag, check_number, check_pair, check_whole, check_word
from xlstm_rl.memory.core import MemoryCore
from xlstm_rl.memory.layers import round_up
from xlstm_rl.memory.mlstm_block import MLSTMBlock, MLSTMBlockState
from xlstm_rl.memory.slstm_block import SLSTMBlock, SLSTMBlockState

XLSTMState = tuple[MLSTMBlockState | SLSTMBlockState, ...]


@dataclass(frozen=True)
class XLSTMConfig:
    """Shape and options of an xLSTM stack.

    Attributes:
        hidden_size: width of the residual stream and of the output; a multiple of the numbers of heads.
        blocks: the stack, spelled bottom to top: "m" an mLSTM block, "s" an sLSTM block ("mmms" is xLSTM[3:1]).
        num_heads: heads of every block.
        slstm_num_heads: heads of sLSTM blocks, if different from `num_heads`. Memory mixing stays within a head, so one
            head tracks states best, while an mLSTM head is a memory of its own.
        input_projection: embed the input linearly into the residual stream; without it, `input_size` must equal
            `hidden_size`.
        proj_factor: inner width of mLSTM blocks over `hidden_size`.
        ffn_factor: inner width of the feed-forward network of sLSTM blocks over `hidden_size`; 0 leaves it out.
        round_to: inner widths are rounded up to a multiple of this. The reference code rounds to 64, which
            dominates small widths.
        qkv_block_size: block size of the block-diagonal q, k, v projections.
        conv_kernel: steps seen by the causal convolution before the gates, the current one included; 0 leaves it out.
        slstm_conv_kernel: the same for sLSTM blocks, if different from `conv_kernel`.
        forget_activation: "sigmoid" or "exp" forget gate.
        input_activation: "exp" (the paper) or "sigmoid" input gate of mLSTM blocks.
        gate_soft_cap: soft cap of the gate pre-activations of mLSTM blocks, for example 15 (Beck et al. 2025).
        init: "recall" starts every convolution as the current step alone and the queries of mLSTM blocks equal to their
            keys, so that reading by content works from the first update; "reference" starts both at random, as the
            reference does.
        mlstm_forget_bias: first and last of the forget biases, spread linearly over the heads.
        slstm_forget_bias: first and last of the forget biases, spread linearly over the units of a head; None takes
            the reference's power law from 5 down to -7.
        recurrent_std: standard deviation of the initial recurrent weights of sLSTM blocks, times 1/sqrt(head
            width); 0 starts without memory mixing, as the reference does.
        dropout: on the output of every block and feed-forward network, in training mode.
        bias: biases in the up and down projections.
        post_norm: layer norm after the last block.
        norm_eps: added to the variance in every norm.

    Raises:
        TypeError: a field is of the wrong kind; the message names it.
        ValueError: a field has an impossible value; the message names it.
    """

    hidden_size: int = 64
    blocks: str = "ms"
    num_heads: int = 4
    slstm_num_heads: int | None = None
    input_projection: bool = True
    proj_factor: float = 2.0
    ffn_factor: float = 4 / 3
    round_to: int = 8
    qkv_block_size: int = 4
    conv_kernel: int = 4
    slstm_conv_kernel: int | None = None
    forget_activation: Literal["sigmoid", "exp"] = "sigmoid"
    input_activation: Literal["exp", "sigmoid"] = "exp"
    gate_soft_cap: float | None = None
    init: Literal["recall", "reference"] = "recall"
    mlstm_forget_bias: tuple[float, float] = (3.0, 6.0)
    slstm_forget_bias: tuple[float, float] | None = None
    recurrent_std: float = 0.0
    dropout: float = 0.0
    bias: bool = False
    post_norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, str):
            raise TypeError(f"blocks={self.blocks!r} must be a word of 'm' (mLSTM) and 's' (sLSTM), such as 'ms'")
        if not self.blocks or set(self.blocks) - set("ms"):
            raise ValueError(f"blocks={self.blocks!r} must be a word of 'm' (mLSTM) and 's' (sLSTM), such as 'ms'")
        for name in ("hidden_size", "num_heads", "round_to", "qkv_block_size"):
            check_whole(name, getattr(self, name), 1)
        check_whole("conv_kernel", self.conv_kernel, 0)
        if self.slstm_conv_kernel is not None:
            check_whole("slstm_conv_kernel", self.slstm_conv_kernel, 0)
        if self.slstm_num_heads is not None:
            check_whole("slstm_num_heads", self.slstm_num_heads, 1)
        for name in ("num_heads", "slstm_num_heads"):
            heads = getattr(self, name)
            if heads is not None and self.hidden_size % heads:
                raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of {name}={heads}")
        for name in ("input_projection", "bias", "post_norm"):
            check_flag(name, getattr(self, name))
        for name in ("forget_activation", "input_activation"):
            check_word(name, getattr(self, name), ("sigmoid", "exp"))
        check_word("init", self.init, ("recall", "reference"))
        check_pair("mlstm_forget_bias", self.mlstm_forget_bias)
        if self.slstm_forget_bias is not None:
            check_pair("slstm_forget_bias", self.slstm_forget_bias)
        self._check_numbers()
        self._check_heads()

    def _check_numbers(self) -> None:
        for name in ("proj_factor", "norm_eps"):
            check_number(name, getattr(self, name), above=0)
        for name in ("ffn_factor", "recurrent_std"):
            check_number(name, getattr(self, name), least=0)
        check_number("dropout", self.dropout, least=0, below=1)
        if self.gate_soft_cap is not None:
            check_number("gate_soft_cap", self.gate_soft_cap, above=0)

    def _check_heads(self) -> None:
        for kind, heads, width in (("m", self.num_heads, self.inner_size), ("s", self.slstm_heads, self.hidden_size)):
            if kind in self.blocks and heads == width:
                name = "slstm_num_heads" if kind == "s" and self.slstm_num_heads is not None else "num_heads"
                raise ValueError(
                    f"{name}={heads} leaves every head of a {kind!r} block one unit, of which its norm leaves nothing: "
                    "take fewer heads"
                )

    @property
    def slstm_heads(self) -> int:
        """Heads of sLSTM blocks."""
        return self.num_heads if self.slstm_num_heads is None else self.slstm_num_heads

    @property
    def slstm_conv(self) -> int:
        """Steps seen by the convolution of sLSTM blocks."""
        return self.conv_kernel if self.slstm_conv_kernel is None else self.slstm_conv_kernel

    @property
    def inner_size(self) -> int:
        """Width inside mLSTM blocks: a multiple of `round_to`, `num_heads` and `qkv_block_size`."""
        multiple = math.lcm(self.round_to, self.num_heads, self.qkv_block_size)
        return round_up(self.proj_factor * self.hidden_size, multiple)

    @property
    def ffn_size(self) -> int:
        """Width inside the feed-forward networks of sLSTM blocks; 0 when there are none."""
        return round_up(self.ffn_factor * self.hidden_size, self.round_to)


class XLSTM(MemoryCore):
    """A stack of xLSTM blocks as a memory core.

    Args:
        input_size: features per step.
        config: the stack; or give its fields as keyword arguments.
        **fields: fields of `XLSTMConfig`, if `config` is not given.

    Raises:
        ValueError: a setting does not fit; the message names it.
        TypeError: a field is unknown or of the wrong kind.
    """

    def __init__(self, input_size: int, config: XLSTMConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is not None and fields:
            raise TypeError(f"give either config or fields, not both; got fields {sorted(fields)}")
        known = [field.name for field in dataclasses.fields(XLSTMConfig)]
        if not fields.keys() <= set(known):
            raise TypeError(f"xLSTM has no setting {sorted(fields.keys() - set(known))}; known are {known}")
        self.config = config = config or XLSTMConfig(**_as_tuples(fields))
        if not config.input_projection and input_size != config.hidden_size:
            raise ValueError(
                f"without input_projection, input_size={input_size} must equal hidden_size={config.hidden_size}"
            )
        self.input_size = input_size
        self.output_size = config.hidden_size
        self.input_projection = nn.Linear(input_size, config.hidden_size) if config.input_projection else nn.Identity()
        kinds = {"m": MLSTMBlock, "s": SLSTMBlock}
        self.blocks = nn.ModuleList(kinds[kind](config, index) for index, kind in enumerate(config.blocks))
        self.post_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False) if config.post_norm else nn.Identity()
        )

    def initial_state(self, batch_size: int) -> XLSTMState:
        """The empty state: one state per block, all zeros."""
        return tuple(block.initial_state(batch_size) for block in self.blocks)  # type: ignore[operator]

    def step(
        self, x: Tensor, state: XLSTMState, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, XLSTMState]:
        """See `MemoryCore.step`."""
        if not self._steps_by_blocks(x):
            reset = None if reset is None else reset.unsqueeze(1)
            y, state = self(x.unsqueeze(1), state, reset, reuse_state=reuse_state)
            return y.squeeze(1), state
        x = self.input_projection(x)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            x, block_state = block.step(x, block_state, reset, reuse_state=reuse_state)  # type: ignore[operator]
            states.append(block_state)
        return self.post_norm(x), tuple(states)

    def _steps_by_blocks(self, x: Tensor) -> bool:
        """Whether a step from x may be that of every block, as no subclass, wrapper or hook would be left out."""
        return (
            can_step(x)
            and type(self) is XLSTM
            and is_bare(self)
            and all(isinstance(block, Block) for block in self.blocks)
        )

    def forward(
        self, x: Tensor, state: XLSTMState, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, XLSTMState]:
        """See `MemoryCore.forward`; `reuse_state` as in `step`, where T is one.

        Under autocast to a dtype that no kernel takes on the device, the stack keeps that of its parameters.
        """
        device = x.device.type
        if _casts_too_far(device):
            dtype = next(self.parameters()).dtype
            with torch.autocast(device, enabled=False):
                return self.forward(x.to(dtype), state, reset, reuse_state=reuse_state)
        if reset is not None:
            check_reset(reset, *x.shape[:2])
            if _starts_nowhere(reset):
                reset = None
        x = self.input_projection(x)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            x, block_state = block(x, block_state, reset, reuse_state=reuse_state)
            states.append(block_state)
        return self.post_norm(x), tuple(states)


def _casts_too_far(device: str) -> bool:
    """Whether autocast is on, and to a dtype that the kernels of the device do not take."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return False
    return device == "cpu" or torch.get_autocast_dtype(device) is not torch.bfloat16


def _starts_nowhere(reset: Tensor) -> bool:
    """Whether it is known, at little cost, that no episode starts: then no mask needs to be applied.

    A device would have to be waited for, a trace would keep the answer of one call for all, and transforms of
    torch.func do not let it be asked for.
    """
    if (
        reset.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return False
    return not bool(reset.any())


def _as_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists only; frozen configurations want tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
