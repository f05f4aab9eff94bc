"""What the Triton kernels share: gate functions and the decays inside one chunk of time."""

import triton
import triton.language as tl


@triton.jit
def log_forget(x, EXP: tl.constexpr):
    """Logarithm of the activated forget gate, the pre-activation itself where the activation is exp."""
    if EXP:
        result = x
    else:
        # log(1 + u) as a series in u / (2 + u): the logarithm of a rounded 1 + u drifts over thousands of open gates.
        u = tl.exp(-tl.abs(x))
        s = u / (2.0 + u)
        p = s * s
        series = 1.0 + p * (1 / 3 + p * (1 / 5 + p * (1 / 7 + p * (1 / 9 + p * (1 / 11 + p * (1 / 13 + p / 15))))))
        result = tl.minimum(x, 0.0) - 2.0 * s * series
    return result


@triton.jit
def forget_slope(x, EXP: tl.constexpr):
    """Derivative of `log_forget`."""
    if EXP:
        result = x * 0.0 + 1.0
    else:
        result = tl.sigmoid(-x)
    return result


@triton.jit
def load_gates(input_ptr, forget_ptr, reset_ptr, row, step, valid, EXP: tl.constexpr):
    """Input gate, forget gate, log decay and reset [L] of a chunk; steps past the end write and forget nothing."""
    input_gate = tl.load(input_ptr + row, mask=valid, other=-float("inf")).to(tl.float32)
    forget_gate = tl.load(forget_ptr + row, mask=valid, other=0.0).to(tl.float32)
    reset = tl.load(reset_ptr + step, mask=valid, other=0).to(tl.int32)
    log_decay = tl.where(valid, log_forget(forget_gate, EXP), 0.0)
    return input_gate, forget_gate, log_decay, reset


@triton.jit
def chunk_decays(log_decay, reset, L: tl.constexpr):
    """Log decays [L (t), L (j)] from step j to t, [L] from the start to t, [L] from j to the end; and who sees whom.

    Each is a sum of just the terms it contains: differences of one running sum would lose digits to cancellation.
    Also segment ids [L], the last segment id, and the pairs [L, L] of one episode with j no later than t.
    """
    i = tl.arange(0, L)
    after = tl.where(i[:, None] > i[None, :], log_decay[:, None], 0.0)
    segment = tl.cumsum(reset, 0)
    last = tl.sum(reset, 0)
    sees = (i[:, None] >= i[None, :]) & (segment[:, None] == segment[None, :])
    return tl.cumsum(after, 0), tl.cumsum(log_decay, 0), tl.sum(after, 0), segment, last, sees


@triton.jit
def chunk_weights(input_gate, log_decay, reset, stabilizer, L: tl.constexpr, EXP: tl.constexpr):
    """Weights of a chunk under the stabilizer `max(log f + m, i, 0)`.

    Returns weights [L (t), L (j)] of step j in the memory after t, [L] of the memory before the chunk after t, [L] of
    step j after the chunk, the scalar of the memory before the chunk after it, the stabilizer [L] and after the chunk.
    """
    never: tl.constexpr = -float("inf")
    i = tl.arange(0, L)
    between, from_start, to_end, segment, last, sees = chunk_decays(log_decay, reset, L)
    # A step lifts the stabilizer to its input gate or to zero, after a reset also to its own decay of nothing.
    source = tl.maximum(input_gate, 0.0)
    if EXP:
        source = tl.where(reset > 0, tl.maximum(source, log_decay), source)
    carried = tl.where(segment == 0, from_start + stabilizer, never)
    m = tl.maximum(tl.max(tl.where(sees, between + source[None, :], never), 1), carried)
    m_end = tl.max(tl.where(i == L - 1, m, 0.0), 0)
    inside = tl.exp(tl.where(sees, between + input_gate[None, :], never) - m[:, None])
    read = tl.exp(carried - m)
    write = tl.exp(tl.where(segment == last, to_end + input_gate, never) - m_end)
    keep = tl.exp(tl.where(last == 0, tl.sum(log_decay, 0) + stabilizer, never) - m_end)
    return inside, read, write, keep, m, m_end


@triton.jit
def least_divisor(stabilizer):
    """The bound exp(-m) below which the mLSTM does not divide by its normalizer, kept away from zero."""
    return tl.exp(-tl.minimum(stabilizer, 60.0))
