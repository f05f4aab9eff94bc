"""The mLSTM in chunks: quadratic inside a chunk, recurrent across chunks, so that its cost is linear in time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, emptied, empty_mlstm_state, least_divisor, log_forget

# One decay matrix carries the state over this many chunks; it is quadratic in them, so longer sequences take several.
CHUNKS_PER_GROUP = 16
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
        state = emptied(state, reset[:, 0])
    if T == 1:
        return _single_step(q, k, v, input_gate, forget_gate, state, forget_activation)

    length, count = _chunk_shape(T, K)
    N = B * H * count
    gates = _gates(input_gate, forget_gate, reset, forget_activation, length, count)
    q, k = _split(q, length, count), _split(k, length, count)  # [N, L, K]
    # The normalizer is the memory of one more value, the constant one.
    v = _split(torch.cat((v, v.new_ones(B, T, H, 1)), -1), length, count)  # [N, L, V + 1]

    log_scale = -0.5 * math.log(K)
    write = torch.exp(gates.to_end - (gates.end_stabilizer - log_scale)[..., None])  # [B, H, C, L]
    updates = torch.bmm((k * write.view(N, length, 1)).transpose(1, 2), v).view(B * H, count, K * (V + 1))
    before, before_stabilizer, final = _carry(updates, gates, state)

    from_start = gates.from_start + before_stabilizer[..., None]  # [B, H, C, L]
    stabilizer = torch.maximum(gates.stabilizer, from_start.detach())
    weight = torch.exp(gates.log_weight - (stabilizer - log_scale)[..., None])  # [B, H, C, L, L]
    weight = torch.bmm(q, k.transpose(1, 2)) * weight.view(N, length, length)
    q = q * torch.exp(from_start - stabilizer).view(N, length, 1)
    read = torch.baddbmm(torch.bmm(weight, v), q, before.reshape(N, K, V + 1))

    total = torch.maximum(read[..., V:].abs(), least_divisor(stabilizer).view(N, length, 1))
    hidden = read[..., :V] / total
    return _join(hidden, B, H, T), final


class _Gates(NamedTuple):
    """Log weights inside the chunks, minus infinity where an episode starts in between.

    Attributes:
        log_weight: [B, H, C, L, L], of the input of step j (last) in the memory after step t.
        from_start: [B, H, C, L], of the memory before the chunk in the memory after step t.
        to_end: [B, H, C, L], of the input of step j in the memory after the chunk.
        over: [B, H, C], of the memory before the chunk in the memory after it; finite, see `breaks`.
        breaks: [B, 1, C] bool or None, whether an episode starts inside the chunk.
        stabilizer: [B, H, C, L], after step t had the memory before the chunk been empty; no gradient.
        end_stabilizer: [B, H, C], the same after the chunk; no gradient.
    """

    log_weight: Tensor
    from_start: Tensor
    to_end: Tensor
    over: Tensor
    breaks: Tensor | None
    stabilizer: Tensor
    end_stabilizer: Tensor


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


def _join(x: Tensor, B: int, H: int, T: int) -> Tensor:
    """[B * H * C, L, D] -> [B, T, H, D], the padding dropped."""
    D = x.shape[-1]
    x = x.view(B, H, -1, D)[:, :, :T]
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
    over, breaks = from_start[..., -1], None
    if segment is not None:
        breaks = segment[..., -1] > 0
        from_start = from_start.masked_fill(segment > 0, NEVER)
        to_end = to_end.masked_fill(segment != segment[..., -1:], NEVER)
        over = over.masked_fill(breaks, 0.0)
    return _Gates(log_weight, from_start, to_end, over, breaks, stabilizer, stabilizer[..., -1])


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


def _carry(updates: Tensor, gates: _Gates, state: MLSTMState) -> tuple[Tensor, Tensor, MLSTMState]:
    """The memory before each chunk [B * H, C, K * (V + 1)], its stabilizer [B, H, C], and the final state."""
    B, H, K, V = state.cell.shape
    memory = torch.cat((state.cell, state.normalizer[..., None]), -1).view(B * H, 1, K * (V + 1))
    stabilizer = state.stabilizer.detach()[..., None]  # [B, H, 1]
    before, before_stabilizer = [], []
    for first in range(0, updates.shape[1], CHUNKS_PER_GROUP):
        group = slice(first, first + CHUNKS_PER_GROUP)
        source_stabilizer = torch.cat((stabilizer, gates.end_stabilizer[..., group]), -1)
        log_weight = _segment_sums(pad(gates.over[..., group], (1, 0)))  # [B, H, C + 1, C + 1]
        log_weight = log_weight + source_stabilizer[..., None, :]
        log_weight = log_weight.masked_fill(_hidden_sources(log_weight, gates.breaks, group), NEVER)
        stabilizer = log_weight.detach().amax(-1)
        weight = torch.exp(log_weight - stabilizer[..., None]).flatten(0, 1)
        memory = torch.bmm(weight, torch.cat((memory, updates[:, group]), 1))
        before.append(memory[:, :-1])
        before_stabilizer.append(stabilizer[..., :-1])
        memory, stabilizer = memory[:, -1:], stabilizer[..., -1:]
    memory = memory.view(B, H, K, V + 1)
    # Copies, so that a carried state does not keep the memories of all chunks alive.
    final = MLSTMState(memory[..., :V].contiguous(), memory[..., V].contiguous(), stabilizer[..., 0].clone())
    if len(before) == 1:
        return before[0], before_stabilizer[0], final
    return torch.cat(before, 1), torch.cat(before_stabilizer, -1), final


def _hidden_sources(log_weight: Tensor, breaks: Tensor | None, group: slice) -> Tensor:
    """Which sources j (the carried memory, then each chunk) do not reach the memory before chunk t."""
    source = torch.arange(log_weight.shape[-1], device=log_weight.device)
    hides = source > source[:, None]
    if breaks is None:
        return hides
    segment = pad(breaks[..., group], (1, 0)).cumsum(-1)  # [B, 1, C + 1]
    return hides | (segment[..., :, None] != segment[..., None, :])


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
