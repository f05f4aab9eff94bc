"""The states that the kernels carry from call to call, and the forget gate they share."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Divisors below exp(-60) only arise from memories that hold nothing but underflow; their reciprocals spoil gradients.
LARGEST_EXPONENT = 60.0

ForgetActivation = Literal["sigmoid", "exp"]


class MLSTMState(NamedTuple):
    """Matrix memory of every row and head; all zeros is the empty state.

    The memory proper is `cell * exp(stabilizer)` and `normalizer * exp(stabilizer)`: the stabilizer is a choice of
    scale, never negative once a step was taken, and carries no gradient.

    Attributes:
        cell: [B, H, K, V], sums of outer products of scaled keys and values.
        normalizer: [B, H, K], sums of scaled keys.
        stabilizer: [B, H], log of the scale of the other two.
    """

    cell: Tensor
    normalizer: Tensor
    stabilizer: Tensor


class SLSTMState(NamedTuple):
    """Scalar memory of every row, head and unit; all zeros is the empty state.

    A normalizer of zero marks an empty unit (after any step it is at least 1), and its stabilizer is then ignored.

    Attributes:
        cell: [B, H, D].
        normalizer: [B, H, D].
        hidden: [B, H, D], the last output, fed back through the recurrent weights.
        stabilizer: [B, H, D], log of the scale of cell and normalizer; carries no gradient.
    """

    cell: Tensor
    normalizer: Tensor
    hidden: Tensor
    stabilizer: Tensor


def empty_mlstm_state(k: Tensor, v: Tensor) -> MLSTMState:
    """Zeros of the shapes that keys [B, T, H, K] and values [B, T, H, V] ask for."""
    B, _, H, K = k.shape
    return MLSTMState(k.new_zeros(B, H, K, v.shape[-1]), k.new_zeros(B, H, K), k.new_zeros(B, H))


def empty_slstm_state(gates: Tensor) -> SLSTMState:
    """Zeros of the shapes that gates [B, T, 4, H, D] ask for."""
    B, _, _, H, D = gates.shape
    return SLSTMState(*(gates.new_zeros(B, H, D) for _ in range(4)))


def zero_where(mask: Tensor, x: Tensor) -> Tensor:
    """Zeros in the rows, steps or heads that a mask marks, whatever was there, NaN included.

    Args:
        mask: bool [B, ...].
        x: [B, ..., ...], first the dimensions of the mask.
    """
    return x.masked_fill(mask.view(*mask.shape, *(1,) * (x.ndim - mask.ndim)), 0.0)


def log_forget(forget_gate: Tensor, activation: ForgetActivation) -> Tensor:
    """Logarithm of the activated forget gate, same shape as the pre-activation."""
    return logsigmoid(forget_gate) if activation == "sigmoid" else forget_gate


def least_divisor(stabilizer: Tensor) -> Tensor:
    """The bound exp(-m) below which the mLSTM does not divide by its normalizer, kept away from zero."""
    return torch.exp(-stabilizer.clamp(max=LARGEST_EXPONENT))
