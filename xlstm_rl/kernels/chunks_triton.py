"""What the Triton kernels of the mLSTM share: loading a chunk of time, its decays, and the weights they give.

Program (x, y, ...) works for row x // H and head x % H; `d` and `column` are the rows and columns of the matrix memory
that are its own.
"""

import triton
import triton.language as tl

from xlstm_rl.kernels.gates_triton import log_forget


@triton.jit
def memory_places(d, column, D: tl.constexpr):
    """Offsets of a part of this program's matrix memory, and of its normalizer."""
    head = tl.program_id(0).to(tl.int64)
    return head * D * D + d[:, None] * D + column[None, :], head * D + d


@triton.jit
def load_chunk(inputs, start, T, H, L: tl.constexpr, EXP: tl.constexpr):
    """Rows [L] of the steps from `start` in tensors [B, T, H], which steps there are, and their gates.

    Returns rows, validity, input gate, forget gate, log decay and reset; steps past the end write and forget nothing.
    """
    head = tl.program_id(0).to(tl.int64)
    t = start + tl.arange(0, L)
    valid = t < T
    step = head // H * T + t
    row = step * H + head % H
    input_gate = tl.load(inputs.input_gate + row, mask=valid, other=-float("inf")).to(tl.float32)
    forget_gate = tl.load(inputs.forget_gate + row, mask=valid, other=0.0).to(tl.float32)
    reset = tl.load(inputs.reset + step, mask=valid, other=0).to(tl.int32)
    log_decay = tl.where(valid, log_forget(forget_gate, EXP), 0.0)
    return row, valid, input_gate, forget_gate, log_decay, reset


@triton.jit
def load_columns(pointer, row, column, valid, D: tl.constexpr):
    """Columns of the steps of a chunk from a tensor [B, T, H, D], zero past the end."""
    return tl.load(pointer + row[:, None] * D + column[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def store_columns(pointer, value, row, column, valid, D: tl.constexpr):
    """Columns of the steps of a chunk to a tensor [B, T, H, D]."""
    at = pointer + row[:, None] * D + column[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def store_steps(pointer, value, row, valid):
    """A number per step of a chunk to a tensor [B, T, H]."""
    tl.store(pointer + row, value.to(pointer.dtype.element_ty), mask=valid)


@triton.jit
def chunk_decays(log_decay, reset, L: tl.constexpr):
    """Log decays [L (t), L (j)] from step j to t, [L] from the start to t, [L] from j to the end, and through it all.

    Each is a sum of just the terms it contains: differences of one running sum would lose digits to cancellation.
    Also segment ids [L], the last segment id, and the pairs [L, L] of one episode with j no later than t.
    """
    i = tl.arange(0, L)
    after = tl.where(i[:, None] > i[None, :], log_decay[:, None], 0.0)
    segment = tl.cumsum(reset, 0)
    last = tl.sum(reset, 0)
    sees = (i[:, None] >= i[None, :]) & (segment[:, None] == segment[None, :])
    between = tl.cumsum(after, 0)
    return between, tl.cumsum(log_decay, 0), tl.sum(after, 0), tl.sum(log_decay, 0), segment, last, sees


@triton.jit
def chunk_stabilizer(decays, input_gate, log_decay, reset, before, EXP: tl.constexpr):
    """The stabilizer `max(log f + m, i, 0)` [L] of every step, from the one before the chunk."""
    never: tl.constexpr = -float("inf")
    between, from_start, _, _, segment, _, sees = decays
    # A step lifts the stabilizer to its input gate or to zero, after a reset also to its own decay of nothing.
    source = tl.maximum(input_gate, 0.0)
    if EXP:
        source = tl.where(reset > 0, tl.maximum(source, log_decay), source)
    carried = tl.where(segment == 0, from_start + before, never)
    return tl.maximum(tl.max(tl.where(sees, between + source[None, :], never), 1), carried)


@triton.jit
def chunk_weights(decays, input_gate, before, stabilizer, after, SCALE: tl.constexpr):
    """Weights of a chunk under its stabilizer [L], that before it and that after it; SCALE is that of the keys.

    Returns weights [L (t), L (j)] of step j in the memory after t, [L] of the memory before the chunk after t, [L] of
    step j after the chunk, and the scalar of the memory before the chunk after it.
    """
    never: tl.constexpr = -float("inf")
    between, from_start, to_end, through, segment, last, sees = decays
    inside = tl.exp(tl.where(sees, between + input_gate[None, :], never) - stabilizer[:, None]) * SCALE
    read = tl.exp(tl.where(segment == 0, from_start + before, never) - stabilizer)
    write = tl.exp(tl.where(segment == last, to_end + input_gate, never) - after) * SCALE
    keep = tl.exp(tl.where(last == 0, through + before, never) - after)
    return inside, read, write, keep


@triton.jit
def spoil_gates(v, input_gate):
    """Move what is not finite in the values into the input gates, from where it reaches what comes after it alone.

    In the values it would reach all steps of the chunk: zero times NaN is NaN.
    """
    x = v.to(tl.float32)
    # zero of what is finite, else NaN
    zero = x - x
    return tl.where(zero == 0.0, x, 0.0).to(v.dtype), input_gate + tl.sum(zero, 1)


@triton.jit
def write_chunk(C, n, k, v, decays, write, keep, PRECISION: tl.constexpr):
    """Matrix memory and normalizer after a chunk; what an episode start throws away may be anything."""
    _, _, _, _, segment, last, _ = decays
    written = tl.where((segment == last)[:, None], k.to(tl.float32) * write[:, None], 0.0)
    C = tl.where(last == 0, C * keep, 0.0)
    n = tl.where(last == 0, n * keep, 0.0)
    return tl.dot(tl.trans(written.to(v.dtype)), v, acc=C, input_precision=PRECISION), n + tl.sum(written, 0)


@triton.jit
def least_divisor(stabilizer):
    """The bound exp(-m) below which the mLSTM does not divide by its normalizer, kept away from zero."""
    return tl.exp(-tl.minimum(stabilizer, 60.0))
