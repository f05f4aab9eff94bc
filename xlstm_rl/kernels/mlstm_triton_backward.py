"""The mLSTM backward on a GPU in two launches: queries in forward order, then everything else in reverse order.

The first carries the matrix memory, the second its gradient, both on chip: no state of a chunk reaches the memory.
Only scalars per step and per chunk edge go from one to the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.gates_triton import chunk_decays, chunk_weights, forget_slope, least_divisor, load_gates
from xlstm_rl.kernels.mlstm_triton import Launch, dot_precision

# By head width and whether the inputs are bfloat16; both launches share the chunk length.
BACKWARD = {
    (16, False): Launch(16, 1),
    (32, False): Launch(16, 2),
    (64, False): Launch(16, 4),
    (128, False): Launch(16, 8),
    (16, True): Launch(16, 1),
    (32, True): Launch(16, 2),
    (64, True): Launch(16, 4),
    (128, True): Launch(16, 8),
}


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
    forget_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, input gate, forget gate, cell and normalizer; all inputs contiguous, T at least 1."""
    B, T, H, D = q.shape
    launch = BACKWARD[D, q.dtype == torch.bfloat16]
    chunks = triton.cdiv(T, launch.tile)
    by_input = tuple(torch.empty_like(x) for x in (q, k, v, input_gate, forget_gate))
    by_state = torch.empty_like(cell), torch.empty_like(normalizer)
    steps = torch.empty(4, B, T, H, device=q.device, dtype=torch.float32)
    edges = torch.empty(B, H, chunks + 1, device=q.device, dtype=torch.float32)
    shared = (q, k, v, input_gate, forget_gate, reset.view(torch.uint8))
    sizes = (T, H, chunks, D, launch.tile, forget_activation == "exp", dot_precision(D, q.dtype))
    with torch.cuda.device_of(q):
        _queries[(B * H,)](
            *(*shared, hidden, d_hidden, cell, normalizer, stabilizer, by_input[0], steps, edges, *sizes),
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
        _others[(B * H,)](
            *(*shared, d_hidden, steps, edges, last_cell, last_normalizer, d_cell, d_normalizer),
            *(*by_input[1:], *by_state, *sizes),
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return (*by_input, *by_state)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
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
    d_q_ptr,
    steps_ptr,
    edges_ptr,
    T,
    H,
    chunks,
    D: tl.constexpr,
    L: tl.constexpr,
    EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward order: d q; per step stabilizer, divisor, slope of the loss by `n . q`, and `q . d q`."""
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    d = tl.arange(0, D)
    C = tl.load(cell_ptr + head * D * D + d[:, None] * D + d[None, :])
    n = tl.load(normalizer_ptr + head * D + d)
    m = tl.load(stabilizer_ptr + head)
    scale: tl.constexpr = D**-0.5
    field = tl.num_programs(0).to(tl.int64) * T
    tl.store(edges_ptr + head * (chunks + 1), m)

    for chunk in range(0, chunks):
        t = chunk * L + tl.arange(0, L)
        valid = t < T
        row = (b * T + t) * H + head % H
        at = row[:, None] * D + d[None, :]
        input_gate, _, log_decay, reset = load_gates(input_ptr, forget_ptr, reset_ptr, row, b * T + t, valid, EXP)
        inside, read, write, keep, stabilizer, m = chunk_weights(input_gate, log_decay, reset, m, L, EXP)
        inside = inside * scale
        q = tl.load(q_ptr + at, mask=valid[:, None], other=0.0)
        k = tl.load(k_ptr + at, mask=valid[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=valid[:, None], other=0.0)
        d_hidden = tl.load(d_hidden_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)

        weight = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inside
        product = tl.sum(weight, 1) + tl.sum(q.to(tl.float32) * n[None, :], 1) * read
        least = least_divisor(stabilizer)
        divisor = tl.maximum(tl.abs(product), least)
        slope = -tl.sum(d_hidden * hidden, 1) / divisor * tl.where(product > 0, 1.0, -1.0)
        slope = tl.where(tl.abs(product) > least, slope, 0.0)

        d_total = (d_hidden / divisor[:, None]).to(q.dtype)
        d_weight = tl.dot(d_total, tl.trans(v), input_precision=PRECISION) + slope[:, None]
        d_q = tl.dot(d_total, tl.trans(C.to(q.dtype)), input_precision=PRECISION) + slope[:, None] * n[None, :]
        d_q = tl.dot((d_weight * inside).to(q.dtype), k, acc=d_q * read[:, None], input_precision=PRECISION)
        tl.store(d_q_ptr + at, d_q.to(d_q_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(steps_ptr + row, stabilizer, mask=valid)
        tl.store(steps_ptr + field + row, divisor, mask=valid)
        tl.store(steps_ptr + 2 * field + row, slope, mask=valid)
        tl.store(steps_ptr + 3 * field + row, tl.sum(d_q * q.to(tl.float32), 1), mask=valid)

        written = k.to(tl.float32) * (write * scale)[:, None]
        C = tl.dot(tl.trans(written.to(v.dtype)), v, acc=C * keep, input_precision=PRECISION)
        n = n * keep + tl.sum(written, 0)
        tl.store(edges_ptr + head * (chunks + 1) + chunk + 1, m)


@triton.jit(do_not_specialize=["T", "H", "chunks"])
def _others(
    q_ptr,
    k_ptr,
    v_ptr,
    input_ptr,
    forget_ptr,
    reset_ptr,
    d_hidden_ptr,
    steps_ptr,
    edges_ptr,
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
    chunks,
    D: tl.constexpr,
    L: tl.constexpr,
    EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reverse order: d k, d v, the gates and the state before the first step."""
    never: tl.constexpr = -float("inf")
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    d = tl.arange(0, D)
    i = tl.arange(0, L)
    scale: tl.constexpr = D**-0.5
    field = tl.num_programs(0).to(tl.int64) * T
    square = head * D * D + d[:, None] * D + d[None, :]
    d_C = tl.load(d_last_cell_ptr + square)
    d_n = tl.load(d_last_normalizer_ptr + head * D + d)
    # The slope of the loss by the log decay of all later steps together: what the final state contributes.
    later = tl.sum(tl.sum(d_C * tl.load(last_cell_ptr + square), 1), 0)
    later += tl.sum(d_n * tl.load(last_normalizer_ptr + head * D + d), 0)
    m_end = tl.load(edges_ptr + head * (chunks + 1) + chunks)

    for back in range(0, chunks):
        chunk = chunks - 1 - back
        t = chunk * L + i
        valid = t < T
        row = (b * T + t) * H + head % H
        at = row[:, None] * D + d[None, :]
        input_gate, forget_gate, log_decay, reset = load_gates(
            input_ptr, forget_ptr, reset_ptr, row, b * T + t, valid, EXP
        )
        between, from_start, to_end, segment, last, sees = chunk_decays(log_decay, reset, L)
        # Infinity keeps the weights of steps past the end at zero.
        stabilizer = tl.load(steps_ptr + row, mask=valid, other=float("inf"))
        divisor = tl.load(steps_ptr + field + row, mask=valid, other=1.0)
        slope = tl.load(steps_ptr + 2 * field + row, mask=valid, other=0.0)
        from_queries = tl.load(steps_ptr + 3 * field + row, mask=valid, other=0.0)
        m = tl.load(edges_ptr + head * (chunks + 1) + chunk)
        inside = tl.exp(tl.where(sees, between + input_gate[None, :], never) - stabilizer[:, None]) * scale
        write = tl.exp(tl.where(segment == last, to_end + input_gate, never) - m_end) * scale
        q = tl.load(q_ptr + at, mask=valid[:, None], other=0.0)
        k = tl.load(k_ptr + at, mask=valid[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=valid[:, None], other=0.0)
        d_hidden = tl.load(d_hidden_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
        d_total = (d_hidden / divisor[:, None]).to(q.dtype)

        weight = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * inside).to(q.dtype)
        d_v = tl.dot(k, d_C.to(q.dtype), input_precision=PRECISION) * write[:, None]
        d_v = tl.dot(tl.trans(weight), d_total, acc=d_v, input_precision=PRECISION)
        tl.store(d_v_ptr + at, d_v.to(d_v_ptr.dtype.element_ty), mask=valid[:, None])
        d_weight = tl.dot(d_total, tl.trans(v), input_precision=PRECISION) + slope[:, None]
        d_k = (tl.dot(v, tl.trans(d_C.to(q.dtype)), input_precision=PRECISION) + d_n[None, :]) * write[:, None]
        d_k = tl.dot(tl.trans((d_weight * inside).to(q.dtype)), q, acc=d_k, input_precision=PRECISION)
        tl.store(d_k_ptr + at, d_k.to(d_k_ptr.dtype.element_ty), mask=valid[:, None])

        d_input = tl.sum(d_k * k.to(tl.float32), 1)
        tl.store(d_input_ptr + row, d_input.to(d_input_ptr.dtype.element_ty), mask=valid)
        # Reads after a step minus writes after it, of one episode: what decayed through the step.
        net = tl.where(valid, from_queries - d_input, 0.0)
        d_decay = tl.sum(tl.where(sees, net[:, None], 0.0), 0) + tl.where(segment == last, later, 0.0)
        d_forget = tl.where(reset == 0, d_decay * forget_slope(forget_gate, EXP), 0.0)
        tl.store(d_forget_ptr + row, d_forget.to(d_forget_ptr.dtype.element_ty), mask=valid)
        later = tl.sum(tl.where(segment == 0, net, 0.0), 0) + tl.where(last == 0, later, 0.0)

        keep = tl.exp(tl.where(last == 0, tl.sum(log_decay, 0) + m, never) - m_end)
        read = tl.exp(tl.where(segment == 0, from_start + m, never) - stabilizer)
        asked = q.to(tl.float32) * read[:, None]
        d_C = tl.dot(tl.trans(asked.to(q.dtype)), d_total, acc=d_C * keep, input_precision=PRECISION)
        d_n = d_n * keep + tl.sum(asked * slope[:, None], 0)
        m_end = m

    tl.store(d_cell_ptr + square, d_C)
    tl.store(d_normalizer_ptr + head * D + d, d_n)
