"""The mLSTM forward on a GPU: one launch per sequence, the matrix memory on chip from the first step to the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.gates_triton import chunk_weights, least_divisor, load_gates, log_forget
from xlstm_rl.kernels.triton_configs import launch_for


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    cell: Tensor,
    normalizer: Tensor,
    stabilizer: Tensor,
    reset: Tensor,
    forget_activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden [B, T, H, D] in the dtype of q, the float32 leaves of the state, and the trace for the backward pass.

    The trace is float32 [2, B, T, H], stabilizer and `n . q` of every step; without `keep` its T is 0.
    Inputs are contiguous, q, k and v of one width, the state in float32, reset bool; T is at least 1.
    """
    B, T, H, D = q.shape
    hidden = torch.empty_like(v)
    final = torch.empty_like(cell), torch.empty_like(normalizer), torch.empty_like(stabilizer)
    trace = stabilizer.new_empty(2, B, T if keep else 0, H)
    inputs = (q, k, v, input_gate, forget_gate, reset.view(torch.uint8), cell, normalizer, stabilizer)
    exponential = forget_activation == "exp"
    with torch.cuda.device_of(q):
        if T == 1:
            launch = launch_for("mlstm_step", q)
            _step[(B * H, D // launch.share)](
                *(*inputs, hidden, *final, trace, H, D, launch.share, exponential, keep),
                num_warps=launch.warps,
                enable_fp_fusion=True,
            )
        else:
            launch = launch_for("mlstm_forward", q)
            _sequence[(B * H, D // launch.share)](
                *(*inputs, hidden, *final, trace, T, H, D, launch.share, launch.chunk),
                *(exponential, keep, launch.precision),
                num_warps=launch.warps,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return hidden, *final, trace


@triton.jit(do_not_specialize=["T", "H"])
def _sequence(
    q_ptr,
    k_ptr,
    v_ptr,
    input_ptr,
    forget_ptr,
    reset_ptr,
    cell_ptr,
    normalizer_ptr,
    stabilizer_ptr,
    hidden_ptr,
    last_cell_ptr,
    last_normalizer_ptr,
    last_stabilizer_ptr,
    trace_ptr,
    T,
    H,
    D: tl.constexpr,
    BV: tl.constexpr,
    L: tl.constexpr,
    EXP: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per row, head and BV columns of the memory walks the chunks in order."""
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    d = tl.arange(0, D)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    # What does not belong to columns is stored by the first program of a head.
    first = tl.program_id(1) == 0
    tile = head * D * D + d[:, None] * D + column[None, :]
    C = tl.load(cell_ptr + tile)
    n = tl.load(normalizer_ptr + head * D + d)
    m = tl.load(stabilizer_ptr + head)
    scale: tl.constexpr = D**-0.5
    field = tl.num_programs(0).to(tl.int64) * T

    for start in range(0, T, L):
        t = start + tl.arange(0, L)
        valid = t < T
        row = (b * T + t) * H + head % H
        at = row[:, None] * D
        q = tl.load(q_ptr + at + d[None, :], mask=valid[:, None], other=0.0)
        k = tl.load(k_ptr + at + d[None, :], mask=valid[:, None], other=0.0)
        v = tl.load(v_ptr + at + column[None, :], mask=valid[:, None], other=0.0)
        input_gate, _, log_decay, reset = load_gates(input_ptr, forget_ptr, reset_ptr, row, b * T + t, valid, EXP)
        inside, read, write, keep, stabilizer, m = chunk_weights(input_gate, log_decay, reset, m, L, EXP)

        weight = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inside * scale
        total = tl.dot(q, C.to(q.dtype), input_precision=PRECISION) * read[:, None]
        total = tl.dot(weight.to(v.dtype), v, acc=total, input_precision=PRECISION)
        product = tl.sum(weight, 1) + tl.sum(q.to(tl.float32) * n[None, :], 1) * read
        hidden = total / tl.maximum(tl.abs(product), least_divisor(stabilizer))[:, None]
        tl.store(hidden_ptr + at + column[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=valid[:, None])
        if KEEP:
            if first:
                tl.store(trace_ptr + row, stabilizer, mask=valid)
                tl.store(trace_ptr + field + row, product, mask=valid)

        written = k.to(tl.float32) * (write * scale)[:, None]
        C = tl.dot(tl.trans(written.to(v.dtype)), v, acc=C * keep, input_precision=PRECISION)
        n = n * keep + tl.sum(written, 0)

    tl.store(last_cell_ptr + tile, C)
    if first:
        tl.store(last_normalizer_ptr + head * D + d, n)
        tl.store(last_stabilizer_ptr + head, m)


@triton.jit(do_not_specialize=["H"])
def _step(
    q_ptr,
    k_ptr,
    v_ptr,
    input_ptr,
    forget_ptr,
    reset_ptr,
    cell_ptr,
    normalizer_ptr,
    stabilizer_ptr,
    hidden_ptr,
    last_cell_ptr,
    last_normalizer_ptr,
    last_stabilizer_ptr,
    trace_ptr,
    H,
    D: tl.constexpr,
    BV: tl.constexpr,
    EXP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """T = 1: one program per row, head and BV columns of the memory, without matrix products."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    at = head * D * D + d[:, None] * D + column[None, :]
    C = tl.load(cell_ptr + at)
    n = tl.load(normalizer_ptr + head * D + d)
    fresh = tl.load(reset_ptr + head // H) != 0
    m = tl.where(fresh, 0.0, tl.load(stabilizer_ptr + head))
    q = tl.load(q_ptr + head * D + d).to(tl.float32)
    k = tl.load(k_ptr + head * D + d).to(tl.float32)
    v = tl.load(v_ptr + head * D + column).to(tl.float32)
    input_gate = tl.load(input_ptr + head).to(tl.float32)
    decayed = log_forget(tl.load(forget_ptr + head).to(tl.float32), EXP) + m

    m = tl.maximum(tl.maximum(decayed, input_gate), 0.0)
    keep = tl.where(fresh, 0.0, tl.exp(decayed - m))
    written = k * (tl.exp(input_gate - m) * D**-0.5)
    C = C * keep + written[:, None] * v[None, :]
    n = n * keep + written
    product = tl.sum(q * n, 0)
    hidden = tl.sum(q[:, None] * C, 0) / tl.maximum(tl.abs(product), least_divisor(m))
    tl.store(hidden_ptr + head * D + column, hidden.to(hidden_ptr.dtype.element_ty))
    tl.store(last_cell_ptr + at, C)
    first = tl.program_id(1) == 0
    if first:
        tl.store(last_normalizer_ptr + head * D + d, n)
        tl.store(last_stabilizer_ptr + head, m)
        if KEEP:
            tl.store(trace_ptr + head, m)
            tl.store(trace_ptr + tl.num_programs(0) + head, product)
