"""Selective diagonal state spaces over a sequence (Gu and Dao 2023, Mamba, section 3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.states import zero_where
from xlstm_rl.kernels.tracing import traced


class SelectiveInputs(NamedTuple):
    """What a selective state space is given."""

    delta: Tensor
    """Step sizes, [B, T, I], at least zero."""
    x: Tensor
    """[B, T, I]"""
    rates: Tensor
    """-A, what decays per unit of delta, [N, I]."""
    write: Tensor
    """B, [B, T, N]"""
    read: Tensor
    """C, [B, T, N]"""
    initial: Tensor
    """h before the first step, [B, N, I]."""


def selective_scan(inputs: SelectiveInputs, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All y_t = C_t h_t with h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t, one step after the other.

    Args:
        inputs: of the state space; T may be zero.
        reset: bool [B, T] or None; true where h is emptied before the step.

    Returns:
        y [B, T, I] and the last h [B, N, I].
    """
    # Autocast computes some of the inputs in half precision, and would do so with the sums over the states.
    delta, x, rates, write, read, initial = (part.to(inputs.initial.dtype) for part in inputs)
    if x.numel() == 0:
        return x, initial
    decay = (-delta.unsqueeze(-2) * rates).exp()  # [B, T, N, I]: features lie innermost, being many
    terms = write.unsqueeze(-1) * (delta * x).unsqueeze(-2)
    hidden, last = diagonal_recurrence(decay, terms, initial, reset)
    return (read.unsqueeze(-2) @ hidden).squeeze(-2).to(x.dtype), last


def diagonal_recurrence(
    decay: Tensor, terms: Tensor, initial: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All h_t = decay_t h_(t-1) + terms_t.

    Args:
        decay: [B, T, ...].
        terms: [B, T, ...].
        initial: [B, ...], h before the first step.
        reset: bool [B, T] or None; true where h is emptied before the step, whatever it was.

    Returns:
        h [B, T, ...] and the last of them [B, ...].
    """
    T = terms.shape[1]
    # Asking which steps are free of starts would wait for a device, and is no question for a trace.
    known = reset is not None and reset.is_cpu and not traced()
    starts = reset.any(0).tolist() if known and reset is not None else [reset is not None] * T
    h, states = initial, []
    for t, (factor, term) in enumerate(zip(decay.unbind(1), terms.unbind(1), strict=True)):
        if reset is not None and starts[t]:
            h = zero_where(reset[:, t], h)
        h = torch.addcmul(term, factor, h)
        states.append(h)
    return torch.stack(states, 1), h
