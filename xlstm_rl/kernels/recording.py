"""Listening to the kernels: what they were given and gave, for those who look inside a memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState, log_forget


class LogGates(NamedTuple):
    """Logarithms of the activated gates, feedback included.

    Attributes:
        input: [B, T, H] of an mLSTM, [B, T, H, D] of an sLSTM.
        forget: of the same shape.
    """

    input: Tensor
    forget: Tensor


class MLSTMCall(NamedTuple):
    """A call of `mlstm_sequence`, arguments and results as there."""

    q: Tensor
    k: Tensor
    v: Tensor
    input_gate: Tensor
    forget_gate: Tensor
    state: MLSTMState
    reset: Tensor | None
    forget_activation: ForgetActivation
    hidden: Tensor
    final: MLSTMState

    def log_gates(self) -> LogGates:
        """Of every head."""
        return LogGates(self.input_gate, log_forget(self.forget_gate, self.forget_activation))


class SLSTMCall(NamedTuple):
    """A call of `slstm_sequence`, arguments and results as there."""

    gates: Tensor
    recurrent: Tensor
    state: SLSTMState
    reset: Tensor | None
    forget_activation: ForgetActivation
    hidden: Tensor
    final: SLSTMState

    def pre_activations(self) -> Tensor:
        """Gates with the feedback of the output before, [B, T, 4, H, D]."""
        before = torch.cat((self.state.hidden[:, None], self.hidden[:, :-1]), dim=1)
        if self.reset is not None:
            before = before.masked_fill(self.reset[..., None, None], 0.0)
        return self.gates + torch.einsum("ahoi,bthi->btaho", self.recurrent, before)

    def log_gates(self) -> LogGates:
        """Of every unit."""
        input_gate, forget_gate, _, _ = self.pre_activations().unbind(2)
        return LogGates(input_gate, log_forget(forget_gate, self.forget_activation))


KernelCall = MLSTMCall | SLSTMCall
_CALLS: ContextVar[list[KernelCall] | None] = ContextVar("kernel_calls", default=None)


@contextmanager
def recorded_calls() -> Iterator[list[KernelCall]]:
    """Note all calls of `mlstm_sequence` and `slstm_sequence` inside the block, in their order.

    Compiled blocks step aside meanwhile, as they compute without such calls.
    """
    calls: list[KernelCall] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def recording() -> bool:
    """Whether calls are noted now; a compiled graph notes none."""
    return not torch.compiler.is_compiling() and _CALLS.get() is not None


def record(call: KernelCall) -> None:
    """Note a call; ask `recording` first."""
    calls = _CALLS.get()
    assert calls is not None
    calls.append(call)
