"""The mLSTM in chunks: quadratic inside a chunk, recurrent across chunks, so that its cost is linear in time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlstm_rl.kernels.mlstm_reference import mlstm_recurrence
from xlstm_rl.kernels.states import (
    ForgetActivation,
    MLSTMState,
    empty_mlstm_state,
    least_divisor,
    log_forget,
    zero_where,
)
from xlstm_rl.kernels.tracing import traced

NEVER = float("-inf")


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, MLSTMState]:
    """Chunkwise form (Beck et al. 2025, "Tiled Flash Linear Attention"), arguments and results as `mlstm_sequence`."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    state = empty_mlstm_state(k, v) if state is None else state
    if T == 0:
        return torch.zeros_like(v), state
    if reset is not None:
        # What an episode start throws away may be NaN, which a product with zero would keep.
        state = MLSTMState._make(zero_where(reset[:, 0], leaf) for leaf in state)
    if T == 1:
        return _single_step(q, k, v, input_gate, forget_gate, state, forget_activation)
    if _lose_digits(input_gate, forget_gate):
        return mlstm_recurrence(q, k, v, input_gate, forget_gate, state, reset, forget_activation)

    length, count = _chunk_shape(T, K)
    N = B * H * count
    k, v, input_gate, forget_gate, state = _spoil_keys(k, v, input_gate, forget_gate, state, forget_activation)
    gates = _gates(input_gate, forget_gate, reset, forget_activation, length, count)
    q, k, v = _split(q, length, count), _split(k, length, count), _split(v, length, count)  # [N, L, K or V]

    log_scale = -0.5 * math.log(K)
    before, after = _chunk_stabilizers(gates, state.stabilizer)
    write = k * torch.exp(gates.to_end - (after - log_scale)[..., None]).view(N, length, 1)
    if gates.before_end is not None:
        write = write.view(B, H, count, length, K).masked_fill(gates.before_end[..., None], 0.0).view(N, length, K)
    keep = torch.exp(gates.over + before - after).view(B * H, count, 1, 1)
    cell, last_cell = _carry(state.cell.reshape(B * H, K, V), keep, torch.bmm(write.transpose(1, 2), v))
    normalizer, last_normalizer = _carry(state.normalizer.reshape(B * H, K), keep[..., 0], write.sum(1))

    from_start = gates.from_start + before[..., None]  # [B, H, C, L]
    stabilizer = torch.maximum(gates.stabilizer, from_start.detach())
    weight = torch.exp(gates.log_weight - (stabilizer - log_scale)[..., None])  # [B, H, C, L, L]
    products = torch.bmm(q, k.transpose(1, 2)).view(B, H, count, length, length)
    weight = (products.masked_fill(gates.hides, 0.0) * weight).view(N, length, length)
    q = q * torch.exp(from_start - stabilizer).view(N, length, 1)
    old_read, old_total = torch.bmm(q, cell), torch.bmm(q, normalizer[..., None])
    if gates.after_start is not None:
        fresh = gates.after_start[..., None].expand(B, H, count, length, 1).reshape(N, length, 1)
        old_read, old_total = old_read.masked_fill(fresh, 0.0), old_total.masked_fill(fresh, 0.0)
    read = torch.baddbmm(old_read, weight, v)
    total = weight.sum(-1, keepdim=True) + old_total
    # A product has a cheaper gradient than a quotient.
    hidden = read * torch.maximum(total.abs(), least_divisor(stabilizer).view(N, length, 1)).reciprocal()
    final = MLSTMState(last_cell.view(B, H, K, V), last_normalizer.view(B, H, K), after[..., -1].clone())
    return _join(hidden, B, H, T, count), final


# Sums of gates are rounded at the size of the largest, and single precision then shows it in the weights.
_LARGEST_GATE = 256.0


def _lose_digits(input_gate: Tensor, forget_gate: Tensor) -> bool:
    """Whether gates are so large that their sums would lose what tells others apart; not asked of a device."""
    if not input_gate.is_cpu or traced():
        return False
    return any(not float(x.detach().abs().amax()) <= _LARGEST_GATE for x in (input_gate, forget_gate) if x.numel())


def _spoil_keys(
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, MLSTMState]:
    """Move what is not finite into the keys, from where it reaches the steps after it and, being masked, no others.

    In values and gates it would reach all steps of a chunk, as zero times NaN is NaN.
    """
    largest = float("inf")
    forget_is_good = forget_gate < largest if forget_activation == "exp" else ~forget_gate.isnan()
    bad = ~(v.isfinite().all(-1) & (input_gate < largest) & forget_is_good)  # [B, T, H]
    k = k.masked_fill(bad[..., None], float("nan"))
    v, input_gate, forget_gate = (zero_where(bad, x) for x in (v, input_gate, forget_gate))
    # so that zeros of a matrix product hide it
    forget_gate = forget_gate.clamp(min=torch.finfo(forget_gate.dtype).min)
    bad_state = ~state.stabilizer.isfinite()
    normalizer = state.normalizer.masked_fill(bad_state[..., None], float("nan"))
    state = MLSTMState(state.cell, normalizer, zero_where(bad_state, state.stabilizer))
    return k, v, input_gate, forget_gate, state


class _Gates(NamedTuple):
    """Log weights inside the chunks, minus infinity where an episode starts in between.

    Attributes:
        log_weight: [B, H, C, L, L], of the input of step j (last) in the memory after step t.
        from_start: [B, H, C, L], of the memory before the chunk in the memory after step t.
        to_end: [B, H, C, L], of the input of step j in the memory after the chunk.
        over: [B, H, C], of the memory before the chunk in the memory after it.
        stabilizer: [B, H, C, L], after step t had the memory before the chunk been empty; no gradient.
        end_stabilizer: [B, H, C], the same after the chunk; no gradient.
        hides: bool, like log_weight or to be expanded to it: after step t no input of step j is left in the memory.
        after_start: bool [B, 1, C, L] or None: an episode started in the chunk, at the step or before.
        before_end: bool [B, 1, C, L] or None: an episode starts in the chunk after the step.
    """

    log_weight: Tensor
    from_start: Tensor
    to_end: Tensor
    over: Tensor
    stabilizer: Tensor
    end_stabilizer: Tensor
    hides: Tensor
    after_start: Tensor | None
    before_end: Tensor | None


def _chunk_shape(T: int, K: int) -> tuple[int, int]:
    """Chunk length and number of chunks: about the head width, evened out so that little padding is needed."""
    longest = 32 if K <= 32 else 64
    count = -(-T // longest)
    return -(-T // count), count


def _split(x: Tensor, length: int, count: int) -> Tensor:
    """[B, T, H, D] -> [B * H * C, L, D], padded with zeros."""
    B, T, H, D = x.shape
    if length * count > T:
        x = pad(x, (0, 0, 0, 0, 0, length * count - T))
    return x.view(B, count, length, H, D).permute(0, 3, 1, 2, 4).reshape(B * H * count, length, D)


def _join(x: Tensor, B: int, H: int, T: int, count: int) -> Tensor:
    """[B * H * C, L, D] -> [B, T, H, D], the padding dropped."""
    D = x.shape[-1]
    x = x.view(B, H, x.shape[1] * count, D)[:, :, :T]
    return x.transpose(1, 2).contiguous()


def _gates(
    input_gate: Tensor,
    forget_gate: Tensor,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
    length: int,
    count: int,
) -> _Gates:
    """Everything inside the chunks that depends on gates and resets only."""
    B, T, H = input_gate.shape
    missing = length * count - T
    log_decay = log_forget(forget_gate, forget_activation)
    # Padded steps write nothing and forget nothing, so the last one still holds the final state.
    log_input = pad(input_gate, (0, 0, 0, missing), value=NEVER).transpose(1, 2).reshape(B, H, count, length)
    log_decay = pad(log_decay, (0, 0, 0, missing)).transpose(1, 2).reshape(B, H, count, length)

    segment = None if reset is None else pad(reset, (0, missing)).view(B, 1, count, length).cumsum(-1)
    step = torch.arange(length, device=input_gate.device)
    hides = step > step[:, None]  # [L, L], after step t (first) the input of a later step j
    if segment is not None:
        hides = hides | (segment[..., :, None] != segment[..., None, :])  # [B, 1, C, L, L]
    sums = _segment_sums(log_decay)
    log_weight = (sums + log_input[..., None, :]).masked_fill(hides, NEVER)
    stabilizer = log_weight.detach().amax(-1).clamp(min=0.0)
    if forget_activation == "exp":
        stabilizer = torch.maximum(stabilizer, _floor(sums.detach(), log_decay.detach(), hides, segment))

    from_start = log_decay @ (step[:, None] <= step).to(log_decay.dtype)
    to_end = log_decay @ (step[:, None] > step).to(log_decay.dtype) + log_input
    after_start = before_end = None
    if segment is not None:
        after_start, before_end = segment > 0, segment != segment[..., -1:]
        from_start = from_start.masked_fill(after_start, NEVER)
        to_end = to_end.masked_fill(before_end, NEVER)
    ends = from_start[..., -1], stabilizer, stabilizer[..., -1]
    return _Gates(log_weight, from_start, to_end, *ends, hides, after_start, before_end)


def _segment_sums(x: Tensor) -> Tensor:
    """Sums over the steps after j up to t: [..., L] -> [..., L (t), L (j)], zero where t <= j.

    A product with zeros and ones adds just the terms of each sum. Differences of cumulative sums lose digits to
    cancellation and leave a rounding residue, instead of zero, in gradients across a reset.
    """
    L = x.shape[-1]
    step = torch.arange(L, device=x.device)
    taken = (step[:, None, None] <= step[:, None]) & (step[:, None, None] > step)  # [L (summed), L (t), L (j)]
    return (x.reshape(-1, L) @ taken.view(L, L * L).to(x.dtype)).view(*x.shape, L)


def _floor(sums: Tensor, log_decay: Tensor, hides: Tensor, segment: Tensor | None) -> Tensor:
    """Lower bound [B, H, C, L] of the stabilizer where forget gates above one lift its floor of zero."""
    if segment is not None:
        starts = pad(segment, (1, 0)).diff(dim=-1) > 0
        sums = sums + (log_decay.clamp(min=0.0) * starts)[..., None, :]
    return sums.masked_fill(hides, NEVER).amax(-1)


@torch.no_grad()
def _chunk_stabilizers(gates: _Gates, first: Tensor) -> tuple[Tensor, Tensor]:
    """Stabilizers [B, H, C] before and after every chunk, from that of the state [B, H] on."""
    stabilizers = [first]
    for over, end in zip(gates.over.unbind(-1), gates.end_stabilizer.unbind(-1), strict=True):
        stabilizers.append(torch.maximum(over + stabilizers[-1], end))
    every = torch.stack(stabilizers, -1)
    return every[..., :-1], every[..., 1:]


def _carry(memory: Tensor, keep: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """Carry a memory over the chunks.

    Args:
        memory: [B * H, ...], before the first chunk.
        keep: [B * H, C, 1, ...], what is kept of it over each chunk.
        updates: [B * H * C, ...], what each chunk adds.

    Returns:
        The memory before each chunk [B * H * C, ...], and after the last [B * H, ...].
    """
    memories = [memory]
    for kept, update in zip(keep.unbind(1), updates.view(*keep.shape[:2], *updates.shape[1:]).unbind(1), strict=True):
        # of what is thrown away nothing may be left, and it may be infinite
        memories.append(torch.addcmul(update, kept, memories[-1].masked_fill(kept == 0, 0.0)))
    return torch.stack(memories[:-1], 1).flatten(0, 1), memories[-1]


def _single_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, MLSTMState]:
    """The recurrence for T = 1, in as few operations as possible: acting spends its time here."""
    q, k, v, input_gate = q[:, 0], k[:, 0], v[:, 0], input_gate[:, 0]
    decayed = log_forget(forget_gate[:, 0], forget_activation) + state.stabilizer.detach()
    stabilizer = torch.maximum(decayed, input_gate).clamp(min=0.0).detach()  # [B, H]
    forget = torch.exp(decayed - stabilizer)[..., None]
    write = k * torch.exp(input_gate - stabilizer)[..., None]
    scale = k.shape[-1] ** -0.5

    cell = torch.addcmul(state.cell * forget[..., None], write[..., None], v[..., None, :], value=scale)
    normalizer = torch.add(state.normalizer * forget, write, alpha=scale)
    weight = torch.linalg.vecdot(q, normalizer).abs()
    read = torch.matmul(q[..., None, :], cell)  # [B, H, 1, V]
    hidden = read / torch.maximum(weight, least_divisor(stabilizer))[..., None, None]
    return hidden.transpose(1, 2), MLSTMState(cell, normalizer, stabilizer)
