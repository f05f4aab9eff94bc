"""Gradient clipping that a quiet optimiser needs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Updates over which the running norm averages.
MEMORY = 100


def clip_gradients(
    parameters: Iterable[Tensor], *, max_norm: float, spike_factor: float | None, running_norm: float | None
) -> float:
    """Scale gradients down to `max_norm`, and to a multiple of their usual norm.

    On a solved task gradients become small and Adam's second moment forgets what large ones were. One rare action with
    a surprising outcome then gives a gradient hundreds of times the usual, still below `max_norm`; Adam keeps moving
    along it for ten updates, farther than PPO's clipped ratio can undo, and the policy breaks. A bound relative to the
    running norm keeps such a step at the size of the others; gradients that stay large raise the bound.

    Args:
        parameters: with gradients.
        max_norm: largest norm of all gradients together.
        spike_factor: largest norm as a multiple of `running_norm`; None for no such bound.
        running_norm: mean of the clipped norms so far, or None before the first update.

    Returns:
        The running norm, this update counted in.

    Raises:
        FloatingPointError: the gradient is NaN or infinite.
    """
    limit = max_norm
    # a norm of zero, where nothing was to be learnt, bounds nothing
    if spike_factor is not None and running_norm:
        limit = min(max_norm, spike_factor * running_norm)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm is {norm}: lower the learning rate, or look for huge observations and rewards"
        )
    clipped = min(norm, limit)
    return clipped if not running_norm else running_norm + (clipped - running_norm) / MEMORY
