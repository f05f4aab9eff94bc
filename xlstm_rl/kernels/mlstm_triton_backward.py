"""The mLSTM backward on a GPU in two passes: queries in forward order, then everything else in reverse order.

The first carries the matrix memory, the second its gradient, both on chip: no state of a chunk reaches the memory.
Where a memory is too large for one program, several take some rows of it each (for queries, keys and gates) or some
columns (for values); what they contribute to a gate is added up afterwards.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.chunks_triton import (
    chunk_decays,
    chunk_weights,
    least_divisor,
    load_chunk,
    load_columns,
    memory_places,
    store_columns,
    store_steps,
    write_chunk,
)
from xlstm_rl.kernels.gates_triton import forget_slope
from xlstm_rl.kernels.states import MLSTMState
from xlstm_rl.kernels.triton_arguments import MLSTMInputs, MLSTMMemory, MLSTMSaved
from xlstm_rl.kernels.triton_configs import launch_for


class Gradients(NamedTuple):
    """Gradients of the inputs [B, T, ...] in their dtype, and of cell and normalizer before the first step."""

    q: Tensor
    k: Tensor
    v: Tensor
    input_gate: Tensor
    forget_gate: Tensor
    cell: Tensor
    normalizer: Tensor


class _Slopes(NamedTuple):
    """What the first pass tells the second: the slope by `n . q` [B, T, H], and `q . d q` [parts, B, T, H]."""

    product: Tensor
    queries: Tensor


def backward(
    d_hidden: Tensor,
    d_last: MLSTMMemory,
    inputs: MLSTMInputs,
    state: MLSTMState,
    saved: MLSTMSaved,
    forget_activation: str,
) -> Gradients:
    """Differentiate `forward` with `keep`; all tensors contiguous, T at least 1."""
    B, T, H, D = inputs.q.shape
    launch = launch_for("mlstm_backward", inputs.q)
    parts = D // launch.share
    # One part is the gradient itself, several are added up.
    gate_dtype = inputs.q.dtype if parts == 1 else torch.float32
    d_input, d_forget = (inputs.q.new_empty(parts, B, T, H, dtype=gate_dtype) for _ in range(2))
    d_q, d_k, d_v = (torch.empty_like(x) for x in inputs[:3])
    d_cell, d_normalizer = (torch.empty_like(x) for x in state[:2])
    gradients = Gradients(d_q, d_k, d_v, d_input, d_forget, d_cell, d_normalizer)
    slopes = _Slopes(torch.empty_like(saved.trace[0]), saved.trace.new_empty(parts, B, T, H))
    tensors = (inputs.as_bytes(), state, saved, d_hidden)
    fixed = (launch.chunk, forget_activation == "exp", launch.precision)
    with torch.cuda.device_of(inputs.q):
        first = (D, launch.share, *fixed)
        _queries[(B * H, parts)](*tensors, gradients.q, slopes, T, H, *first, **launch.options)
        for rows, columns, keys, values in _second_passes(D, launch.share):
            second = (D, rows, columns, keys, values, *fixed)
            grid = (B * H, D // rows, D // columns)
            _others[grid](*tensors, d_last, gradients, slopes, T, H, *second, **launch.options)
    d_input, d_forget = (x[0] if parts == 1 else x.sum(0).to(inputs.q.dtype) for x in (d_input, d_forget))
    return gradients._replace(input_gate=d_input, forget_gate=d_forget)


def _second_passes(D: int, share: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Rows and columns of the memory per program, and whether these compute the keys and the values."""
    return ((D, D, True, True),) if share == D else ((share, D, True, False), (D, share, False, True))


@triton.jit
def _divisors(trace_ptr, field, row, valid):
    """Stabilizer, `n . q` and divisor [L]; infinite stabilizers keep the weights of steps past the end at zero."""
    stabilizer = tl.load(trace_ptr + row, mask=valid, other=float("inf"))
    product = tl.load(trace_ptr + field + row, mask=valid, other=1.0)
    least = least_divisor(stabilizer)
    return stabilizer, product, least, tl.maximum(tl.abs(product), least)


@triton.jit(do_not_specialize=["T", "H"])
def _queries(
    inputs,
    state,
    saved,
    d_hidden_ptr,
    d_q_ptr,
    slopes,
    T,
    H,
    D: tl.constexpr,
    BK: tl.constexpr,
    L: tl.constexpr,
    EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward order, BK rows of the memory per program: d q, and per step the slope by `n . q` and `q . d q`."""
    column = tl.arange(0, D)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    tile, vector = memory_places(d, column, D)
    C = tl.load(state.cell + tile)
    n = tl.load(state.normalizer + vector)
    m = tl.load(state.stabilizer + tl.program_id(0))
    field = tl.num_programs(0).to(tl.int64) * T

    for start in range(0, T, L):
        row, valid, input_gate, _, log_decay, reset = load_chunk(inputs, start, T, H, L, EXP)
        decays = chunk_decays(log_decay, reset, L)
        stabilizer, product, least, divisor = _divisors(saved.trace, field, row, valid)
        is_last = start + tl.arange(0, L) == tl.minimum(start + L, T) - 1
        m_end = tl.max(tl.where(is_last, stabilizer, 0.0), 0)
        inside, read, write, keep = chunk_weights(decays, input_gate, m, stabilizer, m_end, D**-0.5)

        d_hidden = load_columns(d_hidden_ptr, row, column, valid, D).to(tl.float32)
        hidden = load_columns(saved.hidden, row, column, valid, D).to(tl.float32)
        slope = -tl.sum(d_hidden * hidden, 1) / divisor * tl.where(product > 0, 1.0, -1.0)
        slope = tl.where(tl.abs(product) > least, slope, 0.0)

        v = load_columns(inputs.v, row, column, valid, D)
        d_total = (d_hidden / divisor[:, None]).to(v.dtype)
        d_weight = (tl.dot(d_total, tl.trans(v), input_precision=PRECISION) + slope[:, None]) * inside
        d_q = tl.dot(d_total, tl.trans(C.to(v.dtype)), input_precision=PRECISION) + slope[:, None] * n[None, :]
        q = load_columns(inputs.q, row, d, valid, D)
        k = load_columns(inputs.k, row, d, valid, D)
        d_q = tl.dot(d_weight.to(k.dtype), k, acc=d_q * read[:, None], input_precision=PRECISION)
        store_columns(d_q_ptr, d_q, row, d, valid, D)
        if tl.program_id(1) == 0:
            store_steps(slopes.product, slope, row, valid)
        store_steps(slopes.queries + tl.program_id(1) * field, tl.sum(d_q * q.to(tl.float32), 1), row, valid)

        C, n = write_chunk(C, n, k, v, decays, write, keep, PRECISION)
        m = m_end


@triton.jit
def _stabilizer_before(stabilizer_ptr, trace_ptr, start, T, H):
    """The stabilizer after the step before `start`: the initial one, or that of the trace."""
    head = tl.program_id(0).to(tl.int64)
    first = head // H * T * H
    at = first + start * H - H + head % H
    initial = tl.load(stabilizer_ptr + head, mask=at < first, other=0.0)
    return initial + tl.load(trace_ptr + at, mask=at >= first, other=0.0)


@triton.jit(do_not_specialize=["T", "H"])
def _others(
    inputs,
    state,
    saved,
    d_hidden_ptr,
    d_last,
    gradients,
    slopes,
    T,
    H,
    D: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    L: tl.constexpr,
    EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reverse order, BK x BV of the memory per program: d k, the gates and the state before (KEYS), d v (VALUES).

    KEYS needs all columns (BV = D), VALUES all rows (BK = D).
    """
    H = H.to(tl.int64)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    column = tl.program_id(2) * BV + tl.arange(0, BV)
    field = tl.num_programs(0).to(tl.int64) * T
    part = tl.program_id(1) * field
    tile, vector = memory_places(d, column, D)
    d_C = tl.load(d_last.cell + tile)
    m_end = _stabilizer_before(state.stabilizer, saved.trace, T, T, H)
    if KEYS:
        d_n = tl.load(d_last.normalizer + vector)
        # The slope of the loss by the log decay of all later steps together: what the final state contributes.
        later = tl.sum(tl.sum(d_C * tl.load(saved.last.cell + tile), 1), 0)
        later += tl.sum(d_n * tl.load(saved.last.normalizer + vector), 0)

    for back in range(0, T, L):
        start = (T - 1) // L * L - back
        row, valid, input_gate, forget_gate, log_decay, reset = load_chunk(inputs, start, T, H, L, EXP)
        decays = chunk_decays(log_decay, reset, L)
        stabilizer, _, _, divisor = _divisors(saved.trace, field, row, valid)
        m = _stabilizer_before(state.stabilizer, saved.trace, start, T, H)
        inside, read, write, keep = chunk_weights(decays, input_gate, m, stabilizer, m_end, D**-0.5)
        q = load_columns(inputs.q, row, d, valid, D)
        k = load_columns(inputs.k, row, d, valid, D)
        d_hidden = load_columns(d_hidden_ptr, row, column, valid, D).to(tl.float32)
        d_total = (d_hidden / divisor[:, None]).to(q.dtype)

        if VALUES:
            weight = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * inside).to(q.dtype)
            d_v = tl.dot(k, d_C.to(q.dtype), input_precision=PRECISION) * write[:, None]
            d_v = tl.dot(tl.trans(weight), d_total, acc=d_v, input_precision=PRECISION)
            store_columns(gradients.v, d_v, row, column, valid, D)
        if KEYS:
            v = load_columns(inputs.v, row, column, valid, D)
            slope = tl.load(slopes.product + row, mask=valid, other=0.0)
            from_queries = tl.load(slopes.queries + part + row, mask=valid, other=0.0)
            d_weight = (tl.dot(d_total, tl.trans(v), input_precision=PRECISION) + slope[:, None]) * inside
            d_k = (tl.dot(v, tl.trans(d_C.to(q.dtype)), input_precision=PRECISION) + d_n[None, :]) * write[:, None]
            d_k = tl.dot(tl.trans(d_weight.to(q.dtype)), q, acc=d_k, input_precision=PRECISION)
            store_columns(gradients.k, d_k, row, d, valid, D)

            d_input = tl.sum(d_k * k.to(tl.float32), 1)
            store_steps(gradients.input_gate + part, d_input, row, valid)
            # Reads after a step minus writes after it, of one episode: what decayed through the step.
            net = tl.where(valid, from_queries - d_input, 0.0)
            _, _, _, _, segment, last, sees = decays
            d_decay = tl.sum(tl.where(sees, net[:, None], 0.0), 0) + tl.where(segment == last, later, 0.0)
            d_forget = tl.where(reset == 0, d_decay * forget_slope(forget_gate, EXP), 0.0)
            store_steps(gradients.forget_gate + part, d_forget, row, valid)
            later = tl.sum(tl.where(segment == 0, net, 0.0), 0) + tl.where(last == 0, later, 0.0)

        if KEYS:
            d_n = d_n * keep + tl.sum(q.to(tl.float32) * (read * slope)[:, None], 0)
        d_read = (d_hidden * (read / divisor)[:, None]).to(q.dtype)
        d_C = tl.dot(tl.trans(q), d_read, acc=d_C * keep, input_precision=PRECISION)
        m_end = m

    if KEYS:
        tl.store(gradients.cell + tile, d_C)
        tl.store(gradients.normalizer + vector, d_n)
