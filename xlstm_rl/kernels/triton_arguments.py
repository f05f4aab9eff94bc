"""Tensors that travel together: the GPU kernels take them as one argument each."""

from typing import NamedTuple

import torch
from torch import Tensor


class MLSTMInputs(NamedTuple):
    """What an mLSTM reads over a sequence: q, k, v [B, T, H, D], gates [B, T, H], reset bool [B, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    input_gate: Tensor
    forget_gate: Tensor
    reset: Tensor

    def as_bytes(self) -> "MLSTMInputs":
        """The same with resets as numbers."""
        return self._replace(reset=self.reset.view(torch.uint8))


class MLSTMMemory(NamedTuple):
    """What carries gradients in the state of an mLSTM, float32: cell [B, H, D, D], normalizer [B, H, D]."""

    cell: Tensor
    normalizer: Tensor


class MLSTMSaved(NamedTuple):
    """What the backward pass of an mLSTM needs of the forward pass.

    Attributes:
        hidden: [B, T, H, D].
        last: after the last step.
        trace: float32 [2, B, T, H], stabilizer and `n . q` of every step.
    """

    hidden: Tensor
    last: MLSTMMemory
    trace: Tensor


class SLSTMInputs(NamedTuple):
    """What an sLSTM reads over a sequence: gates [B, T, 4, H, D], recurrent [4, H, D, D], reset bool [B, T]."""

    gates: Tensor
    recurrent: Tensor
    reset: Tensor

    def as_bytes(self) -> "SLSTMInputs":
        """The same with resets as numbers."""
        return self._replace(reset=self.reset.view(torch.uint8))


class SLSTMMemory(NamedTuple):
    """What carries gradients in the state of an sLSTM, all float32 [B, H, D]."""

    cell: Tensor
    normalizer: Tensor
    hidden: Tensor


class SLSTMSaved(NamedTuple):
    """What the backward pass of an sLSTM needs of the forward pass.

    Attributes:
        output: [B, T, H, D].
        trace: float32 [F, B, T, H, D], see `slstm_trace_fields`.
    """

    output: Tensor
    trace: Tensor
