"""The xLSTM memory: a residual stack of mLSTM and sLSTM blocks (Beck et al. 2024, arXiv 2405.04517)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xlstm_rl.kernels.argument_checks import check_reset
from xlstm_rl.kernels.tracing import traced
from xlstm_rl.memory.config import XLSTMConfig, check_word
from xlstm_rl.memory.core import MISFITS, MemoryBlock, MemoryCore, make_block
from xlstm_rl.memory.fast import is_bare, run_network, stands_for

StackState = tuple[Any, ...]


class Stack(MemoryCore):
    """Blocks between an input projection and a norm; their laws are those of the stack.

    Args:
        input_size: features per step.
        width: of all blocks, and of the output.
        blocks: bottom to top.
        input_projection: embed the input linearly; without it, `input_size` must equal `width`.
        post_norm: after the last block.
    """

    def __init__(
        self,
        input_size: int,
        width: int,
        blocks: Iterable[nn.Module],
        *,
        input_projection: bool = True,
        post_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, width
        self.input_projection = nn.Linear(input_size, width) if input_projection else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.post_norm = nn.Identity() if post_norm is None else post_norm

    def initial_state(self, batch_size: int) -> StackState:
        """The empty state: one state per block, all zeros."""
        return tuple(block.initial_state(batch_size) for block in self.blocks)  # type: ignore[operator]

    def step(
        self, x: Tensor, state: StackState | None = None, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, StackState]:
        """See `MemoryCore.step`."""
        if state is None or x.ndim != 2 or x.shape[1] != self.input_size:
            state = self._checked_state(x, state, reset, 2)
        if not self._steps_by_blocks(x):
            return super().step(x, state, reset)
        if reset is not None:
            check_reset(reset, len(x))
        h = run_network(self.input_projection, x)
        states = []
        try:
            for block, block_state in zip(self.blocks, state, strict=True):
                h, block_state = block.step(h, block_state, reset, reuse_state=reuse_state)  # type: ignore[operator]
                states.append(block_state)
        except MISFITS:
            # only now, as acting has no time for it
            self._check_fits(state, x)
            raise
        return run_network(self.post_norm, h), tuple(states)

    def _steps_by_blocks(self, x: Tensor) -> bool:
        """Whether a step may be that of every block, as no subclass, wrapper or hook would be left out."""
        return (
            is_bare(self)
            and all(isinstance(block, MemoryBlock) for block in self.blocks)
            and not _casts_too_far(x.device.type)
        )

    def forward(self, x: Tensor, state: StackState, reset: Tensor | None = None) -> tuple[Tensor, StackState]:
        """See `MemoryCore.forward`.

        Under autocast to a dtype that no kernel takes on the device, the stack keeps that of its parameters.
        """
        device = x.device.type
        if _casts_too_far(device):
            dtype = next(self.parameters()).dtype
            with torch.autocast(device, enabled=False):
                return self.forward(x.to(dtype), state, reset)
        if reset is not None:
            check_reset(reset, *x.shape[:2])
            if _starts_nowhere(reset):
                reset = None
        x = run_network(self.input_projection, x)
        states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            x, block_state = block(x, block_state, reset)
            states.append(block_state)
        return run_network(self.post_norm, x), tuple(states)


@stands_for
class XLSTM(Stack):
    """A stack of xLSTM blocks as a memory core.

    Args:
        input_size: features per step.
        config: the stack; or give its fields as keyword arguments.
        defaults: where fields that are not given come from: "recommended" is `XLSTMConfig()`, "paper" is
            `XLSTMConfig.paper()`.
        **fields: fields of `XLSTMConfig`, if `config` is not given.

    Raises:
        ValueError: a setting does not fit; the message names it.
        TypeError: a field is unknown or of the wrong kind.
    """

    def __init__(
        self,
        input_size: int,
        config: XLSTMConfig | None = None,
        *,
        defaults: Literal["recommended", "paper"] = "recommended",
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise TypeError(f"give either config or fields, not both; got fields {sorted(fields)}")
        check_word("defaults", defaults, ("recommended", "paper"))
        known = ["defaults", *(field.name for field in dataclasses.fields(XLSTMConfig))]
        if not fields.keys() <= set(known):
            raise TypeError(f"xLSTM has no setting {sorted(fields.keys() - set(known))}; known are {known}")
        make = XLSTMConfig.paper if defaults == "paper" else XLSTMConfig
        config = config or make(**_as_tuples(fields))
        if not config.input_projection and input_size != config.hidden_size:
            raise ValueError(
                f"without input_projection, input_size={input_size} must equal hidden_size={config.hidden_size}"
            )
        super().__init__(
            input_size,
            config.hidden_size,
            (make_block(letter, config, index) for index, letter in enumerate(config.blocks)),
            input_projection=config.input_projection,
            post_norm=nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False) if config.post_norm else None,
        )
        self.config = config


def _casts_too_far(device: str) -> bool:
    """Whether autocast is on, and to a dtype that the kernels of the device do not take."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return False
    return device == "cpu" or torch.get_autocast_dtype(device) is not torch.bfloat16


def _starts_nowhere(reset: Tensor) -> bool:
    """Whether it is known, at little cost, that no episode starts: a device would have to be waited for."""
    return reset.device.type == "cpu" and not traced() and not bool(reset.any())


def _as_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists only; frozen configurations want tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
