"""What mLSTM and sLSTM blocks share: an acting step, taken in one compiled call where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.modules.module as of_all_modules
from torch import Tensor, nn

from xlstm_rl.kernels.checks import check_reset
from xlstm_rl.kernels.cpp_blocks import KeptPlan, Kind, StepPlan, block_step, can_step
from xlstm_rl.memory.layers import drops


class Block(nn.Module):
    """A residual block around a cell.

    Its state is a named tuple of the state of the cell and `window`, the last inputs of the convolution.
    """

    kind: ClassVar[Kind]
    """The compiled step."""
    state_types: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]
    """Of the block and of its cell."""

    def __init__(self) -> None:
        super().__init__()
        self._kept_plan = KeptPlan()

    def step(
        self, x: Tensor, state: Any, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Run one step.

        Args:
            x: [B, width].
            state: before the step.
            reset: bool [B] or None, true where `x` is the first of an episode.
            reuse_state: see `MemoryCore.step`.

        Returns:
            Output [B, width] and the state after the step.

        Raises:
            TypeError: `reset` is not bool.
            ValueError: `reset` has another shape.
        """
        # A subclass of a kind of blocks may have another forward pass.
        if type(self).__base__ is Block and is_bare(self):
            stepped = self._compiled_step(x, state, reset, reuse_state)
            if stepped is not None:
                return stepped
        if reset is not None:
            reset = reset.unsqueeze(1)
            check_reset(reset, len(x), 1)
        y, state = self(x.unsqueeze(1), state, reset, reuse_state=reuse_state)
        return y.squeeze(1), state

    def _compiled_step(
        self, x: Tensor, state: Any, reset: Tensor | None, reuse_state: bool
    ) -> tuple[Tensor, Any] | None:
        """The step of x [B, width] or [B, 1, width], or None where it has to be taken layer by layer."""
        if not can_step(x) or drops(self._modules["dropout"]):
            return None
        plan = self._kept_plan.get(self._layers(), self._make_plan)
        if plan is None:
            return None
        cell, window = state
        leaves = (*cell, window)
        stepped = block_step(self.kind, plan, x, leaves, reset, reuse_state)
        if stepped is None:
            return None
        y, new = stepped
        if new is leaves:
            return y, state
        of_block, of_cell = self.state_types
        return y, of_block(of_cell(*new[:-1]), new[-1])

    def _layers(self) -> tuple[nn.Module | None, ...]:
        """All layers, those that others hold among them."""
        return tuple(self._modules.values())

    def _make_plan(self) -> StepPlan | None:
        """The plan of the compiled step, or None if layers were replaced or parametrized."""
        raise NotImplementedError


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module runs the forward pass of its class and no hooks: else a step has to be such a call."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or of_all_modules._global_forward_hooks
        or of_all_modules._global_forward_pre_hooks
    )
