"""The mLSTM backward on a GPU in two passes: queries in forward order, then everything else in reverse order.

The first carries the matrix memory, the second its gradient, both on chip: no state of a chunk reaches the memory.
Where a memory is too large for one program, several take some rows of it each (for queries, keys and gates) or some
columns (for values); what they contribute to a gate is added up afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.gates_triton import chunk_decays, forget_slope, least_divisor, load_gates
from xlstm_rl.kernels.triton_configs import launch_for


def backward(
    d_hidden: Tensor,
    d_cell: Tensor,
    d_normalizer: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    cell: Tensor,
    normalizer: Tensor,
    stabilizer: Tensor,
    reset: Tensor,
    hidden: Tensor,
    last_cell: Tensor,
    last_normalizer: Tensor,
    trace: Tensor,
    forget_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, input gate, forget gate, cell and normalizer; all inputs contiguous, T at least 1."""
    B, T, H, D = q.shape
    launch = launch_for("mlstm_backward", q)
    parts = D // launch.share
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_cell_before, d_normalizer_before = torch.empty_like(cell), torch.empty_like(normalizer)
    kind = q.dtype if parts == 1 else torch.float32
    d_input, d_forget = (torch.empty(parts, B, T, H, device=q.device, dtype=kind) for _ in range(2))
    slope, from_queries = torch.empty_like(trace[0]), trace.new_empty(parts, B, T, H)
    gates = (input_gate, forget_gate, reset.view(torch.uint8))
    fixed = (launch.chunk, forget_activation == "exp", launch.precision)
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}

    def others(rows: int, columns: int, keys: bool, values: bool) -> None:
        _others[(B * H, D // rows, D // columns)](
            *(q, k, v, *gates, d_hidden, stabilizer, trace, slope, from_queries),
            *(last_cell, last_normalizer, d_cell, d_normalizer),
            *(d_k, d_v, d_input, d_forget, d_cell_before, d_normalizer_before),
            *(T, H, D, rows, columns, keys, values, *fixed),
            **options,
        )

    with torch.cuda.device_of(q):
        _queries[(B * H, parts)](
            *(q, k, v, *gates, hidden, d_hidden, cell, normalizer, stabilizer, trace, d_q, slope, from_queries),
            *(T, H, D, launch.share, *fixed),
            **options,
        )
        if parts == 1:
            others(D, D, True, True)
        else:
            others(launch.share, D, True, False)
            others(D, launch.share, False, True)
    by_gates = [x[0] if parts == 1 else x.sum(0).to(q.dtype) for x in (d_input, d_forget)]
    return d_q, d_k, d_v, by_gates[0], by_gates[1], d_cell_before, d_normalizer_before


@triton.jit
def _stabilizer_before(stabilizer_ptr, trace_ptr, head, start, b, T, H):
    """The stabilizer after the step before `start`: the initial one, or that of the trace."""
    at = (b * T + start - 1) * H + head % H
    inside = at >= b * T * H
    return tl.load(stabilizer_ptr + head, mask=at < b * T * H, other=0.0) + tl.load(
        trace_ptr + at, mask=inside, other=0.0
    )


@triton.jit
def _divisors(trace_ptr, field, row, valid):
    """Stabilizer, `n . q` and divisor [L]; infinite stabilizers keep the weights of steps past the end at zero."""
    stabilizer = tl.load(trace_ptr + row, mask=valid, other=float("inf"))
    product = tl.load(trace_ptr + field + row, mask=valid, other=1.0)
    least = least_divisor(stabilizer)
    return stabilizer, product, least, tl.maximum(tl.abs(product), least)


@triton.jit(do_not_specialize=["T", "H"])
def _queries(
    q_ptr,
    k_ptr,
    v_ptr,
    input_ptr,
    forget_ptr,
    reset_ptr,
    hidden_ptr,
    d_hidden_ptr,
    cell_ptr,
    normalizer_ptr,
    stabilizer_ptr,
    trace_ptr,
    d_q_ptr,
    slope_ptr,
    from_queries_ptr,
    T,
    H,
    D: tl.constexpr,
    BK: tl.constexpr,
    L: tl.constexpr,
    EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward order, BK rows of the memory per program: d q, and per step the slope by `n . q` and `q . d q`."""
    never: tl.constexpr = -float("inf")
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    column = tl.arange(0, D)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    C = tl.load(cell_ptr + head * D * D + d[:, None] * D + column[None, :])
    n = tl.load(normalizer_ptr + head * D + d)
    m = tl.load(stabilizer_ptr + head)
    scale: tl.constexpr = D**-0.5
    field = tl.num_programs(0).to(tl.int64) * T

    for start in range(0, T, L):
        t = start + tl.arange(0, L)
        valid = t < T
        row = (b * T + t) * H + head % H
        narrow = row[:, None] * D + d[None, :]
        wide = row[:, None] * D + column[None, :]
        input_gate, _, log_decay, reset = load_gates(input_ptr, forget_ptr, reset_ptr, row, b * T + t, valid, EXP)
        between, from_start, to_end, segment, last, sees = chunk_decays(log_decay, reset, L)
        stabilizer, product, least, divisor = _divisors(trace_ptr, field, row, valid)
        m_end = tl.max(tl.where(valid, stabilizer, 0.0) * (t == tl.minimum(start + L, T) - 1), 0)
        inside = tl.exp(tl.where(sees, between + input_gate[None, :], never) - stabilizer[:, None]) * scale
        read = tl.exp(tl.where(segment == 0, from_start + m, never) - stabilizer)

        d_hidden = tl.load(d_hidden_ptr + wide, mask=valid[:, None], other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + wide, mask=valid[:, None], other=0.0).to(tl.float32)
        slope = -tl.sum(d_hidden * hidden, 1) / divisor * tl.where(product > 0, 1.0, -1.0)
        slope = tl.where(tl.abs(product) > least, slope, 0.0)

        v = tl.load(v_ptr + wide, mask=valid[:, None], other=0.0)
        d_total = (d_hidden / divisor[:, None]).to(v.dtype)
        d_weight = tl.dot(d_total, tl.trans(v), input_precision=PRECISION) + slope[:, None]
        d_q = tl.dot(d_total, tl.trans(C.to(v.dtype)), input_precision=PRECISION) + slope[:, None] * n[None, :]
        q = tl.load(q_ptr + narrow, mask=valid[:, None], other=0.0)
        k = tl.load(k_ptr + narrow, mask=valid[:, None], other=0.0)
        d_q = tl.dot((d_weight * inside).to(k.dtype), k, acc=d_q * read[:, None], input_precision=PRECISION)
        tl.store(d_q_ptr + narrow, d_q.to(d_q_ptr.dtype.element_ty), mask=valid[:, None])
        if tl.program_id(1) == 0:
            tl.store(slope_ptr + row, slope, mask=valid)
        part = tl.program_id(1) * field
        tl.store(from_queries_ptr + part + row, tl.sum(d_q * q.to(tl.float32), 1), mask=valid)

        keep = tl.exp(tl.where(last == 0, tl.sum(log_decay, 0) + m, never) - m_end)
        write = tl.exp(tl.where(segment == last, to_end + input_gate, never) - m_end) * scale
        written = k.to(tl.float32) * write[:, None]
        C = tl.dot(tl.trans(written.to(v.dtype)), v, acc=C * keep, input_precision=PRECISION)
        n = n * keep + tl.sum(written, 0)
        m = m_end


@triton.jit(do_not_specialize=["T", "H"])
def _others(
    q_ptr,
    k_ptr,
    v_ptr,
    input_ptr,
    forget_ptr,
    reset_ptr,
    d_hidden_ptr,
    stabilizer_ptr,
    trace_ptr,
    slope_ptr,
    from_queries_ptr,
    last_cell_ptr,
    last_normalizer_ptr,
    d_last_cell_ptr,
    d_last_normalizer_ptr,
    d_k_ptr,
    d_v_ptr,
    d_input_ptr,
    d_forget_ptr,
    d_cell_ptr,
    d_normalizer_ptr,
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
    never: tl.constexpr = -float("inf")
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    column = tl.program_id(2) * BV + tl.arange(0, BV)
    i = tl.arange(0, L)
    scale: tl.constexpr = D**-0.5
    field = tl.num_programs(0).to(tl.int64) * T
    part = tl.program_id(1) * field
    tile = head * D * D + d[:, None] * D + column[None, :]
    d_C = tl.load(d_last_cell_ptr + tile)
    m_end = tl.load(trace_ptr + (b * T + T - 1) * H + head % H)
    if KEYS:
        d_n = tl.load(d_last_normalizer_ptr + head * D + d)
        # The slope of the loss by the log decay of all later steps together: what the final state contributes.
        later = tl.sum(tl.sum(d_C * tl.load(last_cell_ptr + tile), 1), 0)
        later += tl.sum(d_n * tl.load(last_normalizer_ptr + head * D + d), 0)

    for back in range(0, T, L):
        start = (T - 1) // L * L - back
        t = start + i
        valid = t < T
        row = (b * T + t) * H + head % H
        narrow = row[:, None] * D + d[None, :]
        wide = row[:, None] * D + column[None, :]
        input_gate, forget_gate, log_decay, reset = load_gates(
            input_ptr, forget_ptr, reset_ptr, row, b * T + t, valid, EXP
        )
        between, from_start, to_end, segment, last, sees = chunk_decays(log_decay, reset, L)
        stabilizer, _, _, divisor = _divisors(trace_ptr, field, row, valid)
        m = _stabilizer_before(stabilizer_ptr, trace_ptr, head, start, b, T, H)
        inside = tl.exp(tl.where(sees, between + input_gate[None, :], never) - stabilizer[:, None]) * scale
        read = tl.exp(tl.where(segment == 0, from_start + m, never) - stabilizer)
        write = tl.exp(tl.where(segment == last, to_end + input_gate, never) - m_end) * scale
        keep = tl.exp(tl.where(last == 0, tl.sum(log_decay, 0) + m, never) - m_end)
        q = tl.load(q_ptr + narrow, mask=valid[:, None], other=0.0)
        k = tl.load(k_ptr + narrow, mask=valid[:, None], other=0.0)
        d_hidden = tl.load(d_hidden_ptr + wide, mask=valid[:, None], other=0.0).to(tl.float32)
        d_total = (d_hidden / divisor[:, None]).to(q.dtype)
        asked = q.to(tl.float32) * read[:, None]

        if VALUES:
            weight = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * inside).to(q.dtype)
            d_v = tl.dot(k, d_C.to(q.dtype), input_precision=PRECISION) * write[:, None]
            d_v = tl.dot(tl.trans(weight), d_total, acc=d_v, input_precision=PRECISION)
            tl.store(d_v_ptr + wide, d_v.to(d_v_ptr.dtype.element_ty), mask=valid[:, None])
        if KEYS:
            v = tl.load(v_ptr + wide, mask=valid[:, None], other=0.0)
            slope = tl.load(slope_ptr + row, mask=valid, other=0.0)
            from_queries = tl.load(from_queries_ptr + part + row, mask=valid, other=0.0)
            d_weight = (tl.dot(d_total, tl.trans(v), input_precision=PRECISION) + slope[:, None]) * inside
            d_k = (tl.dot(v, tl.trans(d_C.to(q.dtype)), input_precision=PRECISION) + d_n[None, :]) * write[:, None]
            d_k = tl.dot(tl.trans(d_weight.to(q.dtype)), q, acc=d_k, input_precision=PRECISION)
            tl.store(d_k_ptr + narrow, d_k.to(d_k_ptr.dtype.element_ty), mask=valid[:, None])

            d_input = tl.sum(d_k * k.to(tl.float32), 1)
            tl.store(d_input_ptr + part + row, d_input.to(d_input_ptr.dtype.element_ty), mask=valid)
            # Reads after a step minus writes after it, of one episode: what decayed through the step.
            net = tl.where(valid, from_queries - d_input, 0.0)
            d_decay = tl.sum(tl.where(sees, net[:, None], 0.0), 0) + tl.where(segment == last, later, 0.0)
            d_forget = tl.where(reset == 0, d_decay * forget_slope(forget_gate, EXP), 0.0)
            tl.store(d_forget_ptr + part + row, d_forget.to(d_forget_ptr.dtype.element_ty), mask=valid)
            later = tl.sum(tl.where(segment == 0, net, 0.0), 0) + tl.where(last == 0, later, 0.0)
            d_n = d_n * keep + tl.sum(asked * slope[:, None], 0)

        d_C = tl.dot(tl.trans(asked.to(q.dtype)), d_total, acc=d_C * keep, input_precision=PRECISION)
        m_end = m

    if KEYS:
        tl.store(d_cell_ptr + tile, d_C)
        tl.store(d_normalizer_ptr + head * D + d, d_n)
