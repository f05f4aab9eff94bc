"""The time mixing of RWKV-4 over a sequence (Peng et al. 2023, equation 16), all steps at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.states import zero_where


class WKVState(NamedTuple):
    """Exponentially weighted sums of every row and feature; all zeros is the empty state.

    The sums proper are `numerator * exp(stabilizer)` and `denominator * exp(stabilizer)`. A denominator of zero marks
    an empty feature (after any step it is at least 1), and its stabilizer is then ignored.

    Attributes:
        numerator: [B, D], of the values.
        denominator: [B, D], of the weights.
        stabilizer: [B, D], log of the scale of both; carries no gradient.
    """

    numerator: Tensor
    denominator: Tensor
    stabilizer: Tensor


def wkv_sequence(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, state: WKVState, reset: Tensor | None = None
) -> tuple[Tensor, WKVState]:
    """Averages of the values so far, with weights exp(k_i) that decay by exp(-decay) a step.

    y_t = (S_(t-1)[v] + exp(bonus + k_t) v_t) / (S_(t-1)[1] + exp(bonus + k_t)) with
    S_t[x] = exp(-decay) S_(t-1)[x] + exp(k_t) x_t. The sums of all steps are found in log2(T) passes, each of which
    doubles the number of steps that are summed up (Hillis and Steele 1986).

    Args:
        k: [B, T, D], logarithms of the weights; T may be zero.
        v: [B, T, D].
        decay: [D], above zero.
        bonus: [D].
        state: the sums before the first step.
        reset: bool [B, T] or None, true where an episode starts and the sums are emptied before the step.

    Returns:
        y [B, T, D] and the sums after the last step.
    """
    # Autocast would give keys and values in half precision, whose exponentials are worth little.
    k, v, decay, bonus = (part.to(state.numerator.dtype) for part in (k, v, decay, bonus))
    B, T, D = k.shape
    if T == 0:
        return v, state
    episode = k.new_zeros(B, T + 1, dtype=torch.long)  # of the state, and of every step
    if reset is not None:
        episode[:, 1:] = reset.cumsum(1)
    # The scale is a choice, which gradients need not know: what is differentiated is exp(k - its own value) = 1.
    scale = k.detach()
    weight = (k - scale).exp()
    first = (part[:, None] for part in state)
    sums = WKVState(*(torch.cat(pair, 1) for pair in zip(first, (weight * v, weight, scale), strict=True)))
    span = 1
    while span <= T:
        older, newer = (WKVState(*(part[:, at] for part in sums)) for at in (slice(None, -span), slice(span, None)))
        other = (episode[:, :-span] != episode[:, span:])[..., None].expand(B, -1, D)
        joined = _join(older, newer, span * decay, other)
        sums = WKVState(*(torch.cat((part[:, :span], rest), 1) for part, rest in zip(sums, joined, strict=True)))
        span *= 2
    before = WKVState(*(part[:, :-1] for part in sums))
    other = (episode[:, :-1] != episode[:, 1:])[..., None].expand(B, T, D)
    scale = (bonus + k).detach()
    weight = (bonus + k - scale).exp()
    mixed = _join(before, WKVState(weight * v, weight, scale), torch.zeros_like(decay), other)
    return mixed.numerator / mixed.denominator, WKVState(*(part[:, -1] for part in sums))


def _join(older: WKVState, newer: WKVState, decay: Tensor, other: Tensor) -> WKVState:
    """The sums over both, [B, N, D] each; the older ones, which decayed, count for nothing where `other` says so."""
    other = other | (older.denominator == 0)
    exponent = older.stabilizer - decay
    scale = torch.where(other, newer.stabilizer, torch.maximum(exponent.detach(), newer.stabilizer))
    kept = zero_where(other, exponent - scale).exp()
    added = (newer.stabilizer - scale).exp()
    numerator, denominator = (
        zero_where(other, old) * kept + new * added for old, new in zip(older[:2], newer[:2], strict=True)
    )
    return WKVState(numerator, denominator, scale)
