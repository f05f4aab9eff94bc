"""The sLSTM on a GPU: one launch walks all the steps of 16 rows and a head, the recurrent weights on chip.

Acting is the same launch with T = 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.gates_triton import forget_slope, log_forget
from xlstm_rl.kernels.triton_configs import launch_for, slstm_trace_fields

# The smallest side of a matrix product on the tensor cores.
ROWS = 16


def forward(
    gates: Tensor,
    recurrent: Tensor,
    cell: Tensor,
    normalizer: Tensor,
    hidden: Tensor,
    stabilizer: Tensor,
    reset: Tensor,
    forget_activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden [B, T, H, D] in the dtype of the gates, the float32 leaves of the state, and the trace for `backward`.

    The trace is float32 [F, B, T, H, D], see `slstm_trace_fields`; without `keep` its T is 0.
    Inputs are contiguous, the state in float32, reset bool; T is at least 1.
    """
    B, T, _, H, D = gates.shape
    output = gates.new_empty(B, T, H, D)
    final = tuple(torch.empty_like(cell) for _ in range(4))
    fields = slstm_trace_fields(gates)
    trace = cell.new_empty(fields, B, T if keep else 0, H, D)
    launch = launch_for("slstm_forward", gates)
    with torch.cuda.device_of(gates):
        _forward[(triton.cdiv(B, ROWS), H)](
            *(gates, recurrent, cell, normalizer, hidden, stabilizer, reset.view(torch.uint8), output, *final, trace),
            *(B, T, H, D, ROWS, forget_activation == "exp", fields if keep else 0, launch.precision),
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return output, *final, trace  # type: ignore[return-value]


def backward(
    d_output: Tensor,
    d_cell: Tensor,
    d_normalizer: Tensor,
    d_hidden: Tensor,
    gates: Tensor,
    recurrent: Tensor,
    cell: Tensor,
    normalizer: Tensor,
    hidden: Tensor,
    stabilizer: Tensor,
    reset: Tensor,
    output: Tensor,
    trace: Tensor,
    forget_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent weights, cell, normalizer and hidden; all inputs contiguous, T at least 1."""
    B, T, _, H, D = gates.shape
    d_gates = torch.empty_like(gates)
    by_state = tuple(torch.empty_like(cell) for _ in range(3))
    launch = launch_for("slstm_backward", gates)
    with torch.cuda.device_of(gates):
        _backward[(triton.cdiv(B, ROWS), H)](
            *(gates, recurrent, cell, normalizer, hidden, stabilizer, reset.view(torch.uint8), output, trace),
            *(d_output, d_cell, d_normalizer, d_hidden, d_gates, *by_state),
            *(B, T, H, D, ROWS, forget_activation == "exp", len(trace), launch.precision),
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return d_gates, _recurrent_gradient(d_gates, output, hidden, reset), *by_state  # type: ignore[return-value]


def _recurrent_gradient(d_gates: Tensor, output: Tensor, hidden: Tensor, reset: Tensor) -> Tensor:
    """Gradient [4, H, D, D] of the recurrent weights, one matrix product over all steps of all rows."""
    B, T, _, H, D = d_gates.shape
    before = torch.cat((hidden[:, None].to(output.dtype), output[:, :-1]), 1).masked_fill(reset[..., None, None], 0.0)
    left = d_gates.permute(3, 2, 4, 0, 1).reshape(H, 4 * D, B * T)
    right = before.permute(2, 0, 1, 3).reshape(H, B * T, D)
    return torch.bmm(left, right).view(H, 4, D, D).transpose(0, 1).contiguous()


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _load_weights(recurrent_ptr, H, D: tl.constexpr):
    """The weights of the four gates [D (in), D (out)] each."""
    d = tl.arange(0, D)
    at = recurrent_ptr + tl.program_id(1) * D * D + d[None, :] * D + d[:, None]
    gate = H * D * D
    return tl.load(at), tl.load(at + gate), tl.load(at + 2 * gate), tl.load(at + 3 * gate)


@triton.jit
def _pre_activations(gates_ptr, at, rows, hidden, weights, H, D: tl.constexpr, PRECISION: tl.constexpr):
    """Gates [ROWS, D] of a step with the feedback added."""
    gate = H * D
    x = hidden.to(gates_ptr.dtype.element_ty)
    i = tl.load(gates_ptr + at, mask=rows, other=0.0).to(tl.float32)
    f = tl.load(gates_ptr + at + gate, mask=rows, other=0.0).to(tl.float32)
    z = tl.load(gates_ptr + at + 2 * gate, mask=rows, other=0.0).to(tl.float32)
    o = tl.load(gates_ptr + at + 3 * gate, mask=rows, other=0.0).to(tl.float32)
    i = tl.dot(x, weights[0], acc=i, input_precision=PRECISION)
    f = tl.dot(x, weights[1], acc=f, input_precision=PRECISION)
    z = tl.dot(x, weights[2], acc=z, input_precision=PRECISION)
    o = tl.dot(x, weights[3], acc=o, input_precision=PRECISION)
    return i, f, z, o


@triton.jit(do_not_specialize=["B", "T", "H"])
def _forward(
    gates_ptr,
    recurrent_ptr,
    cell_ptr,
    normalizer_ptr,
    hidden_ptr,
    stabilizer_ptr,
    reset_ptr,
    output_ptr,
    last_cell_ptr,
    last_normalizer_ptr,
    last_hidden_ptr,
    last_stabilizer_ptr,
    trace_ptr,
    B,
    T,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EXP: tl.constexpr,
    FIELDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per 16 rows and head walks all steps."""
    never: tl.constexpr = -float("inf")
    head = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    rows = (b < B)[:, None]
    leaf = (b[:, None] * H + head) * D + d[None, :]
    field = B.to(tl.int64) * T * H * D
    c = tl.load(cell_ptr + leaf, mask=rows, other=0.0)
    n = tl.load(normalizer_ptr + leaf, mask=rows, other=0.0)
    hidden = tl.load(hidden_ptr + leaf, mask=rows, other=0.0)
    # Minus infinity makes the forget factor of an empty unit exactly zero.
    m = tl.where(n == 0.0, never, tl.load(stabilizer_ptr + leaf, mask=rows, other=0.0))
    weights = _load_weights(recurrent_ptr, H, D)

    for t in range(0, T):
        step = b * T + t
        kept = (tl.load(reset_ptr + step, mask=b < B, other=0) == 0)[:, None]
        at = (step[:, None] * 4 * H + head) * D + d[None, :]
        hidden = tl.where(kept, hidden, 0.0)
        i, f, z, o = _pre_activations(gates_ptr, at, rows, hidden, weights, H, D, PRECISION)
        decayed = tl.where(kept, log_forget(f, EXP) + m, never)
        m = tl.maximum(decayed, i)
        forget = tl.exp(decayed - m)
        write = tl.exp(i - m)
        c = forget * c + write * _tanh(z)
        n = forget * n + write
        hidden = tl.sigmoid(o) * c / n
        out = (step[:, None] * H + head) * D + d[None, :]
        tl.store(output_ptr + out, hidden.to(output_ptr.dtype.element_ty), mask=rows)
        if FIELDS > 0:
            tl.store(trace_ptr + out, c, mask=rows)
            tl.store(trace_ptr + field + out, n, mask=rows)
            tl.store(trace_ptr + 2 * field + out, m, mask=rows)
        if FIELDS == 7:
            tl.store(trace_ptr + 3 * field + out, i, mask=rows)
            tl.store(trace_ptr + 4 * field + out, f, mask=rows)
            tl.store(trace_ptr + 5 * field + out, z, mask=rows)
            tl.store(trace_ptr + 6 * field + out, o, mask=rows)

    tl.store(last_cell_ptr + leaf, c, mask=rows)
    tl.store(last_normalizer_ptr + leaf, n, mask=rows)
    tl.store(last_hidden_ptr + leaf, hidden, mask=rows)
    tl.store(last_stabilizer_ptr + leaf, m, mask=rows)


@triton.jit
def _load_before(first_ptr, later_ptr, leaf, before, is_first, rows):
    """What a leaf was before a step: the initial state before the first one, the trace elsewhere."""
    initial = tl.load(first_ptr + leaf, mask=rows & is_first, other=0.0).to(tl.float32)
    return initial + tl.load(later_ptr + before, mask=rows & (is_first == 0), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B", "T", "H"])
def _backward(
    gates_ptr,
    recurrent_ptr,
    cell_ptr,
    normalizer_ptr,
    hidden_ptr,
    stabilizer_ptr,
    reset_ptr,
    output_ptr,
    trace_ptr,
    d_output_ptr,
    d_last_cell_ptr,
    d_last_normalizer_ptr,
    d_last_hidden_ptr,
    d_gates_ptr,
    d_cell_ptr,
    d_normalizer_ptr,
    d_hidden_ptr,
    B,
    T,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EXP: tl.constexpr,
    FIELDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reverse order, the gates from the trace or computed again; the stabilizer is a constant, it cancels."""
    never: tl.constexpr = -float("inf")
    head = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    rows = (b < B)[:, None]
    leaf = (b[:, None] * H + head) * D + d[None, :]
    field = B.to(tl.int64) * T * H * D
    d_c = tl.load(d_last_cell_ptr + leaf, mask=rows, other=0.0)
    d_n = tl.load(d_last_normalizer_ptr + leaf, mask=rows, other=0.0)
    d_h = tl.load(d_last_hidden_ptr + leaf, mask=rows, other=0.0)
    weights = _load_weights(recurrent_ptr, H, D)

    for back in range(0, T):
        step = b * T + (T - 1 - back)
        # Not a comparison of scalars: a loop variable of the interpreter is a plain number.
        is_first = (step == b * T)[:, None]
        kept = (tl.load(reset_ptr + step, mask=b < B, other=0) == 0)[:, None]
        out = (step[:, None] * H + head) * D + d[None, :]
        before = out - H * D
        c = tl.load(trace_ptr + out, mask=rows, other=0.0)
        n = tl.load(trace_ptr + field + out, mask=rows, other=1.0)
        m = tl.load(trace_ptr + 2 * field + out, mask=rows, other=0.0)
        old_c = _load_before(cell_ptr, trace_ptr, leaf, before, is_first, rows)
        old_n = _load_before(normalizer_ptr, trace_ptr + field, leaf, before, is_first, rows)
        old_m = _load_before(stabilizer_ptr, trace_ptr + 2 * field, leaf, before, is_first, rows)
        at = (step[:, None] * 4 * H + head) * D + d[None, :]
        if FIELDS == 7:
            i = tl.load(trace_ptr + 3 * field + out, mask=rows, other=0.0)
            f = tl.load(trace_ptr + 4 * field + out, mask=rows, other=0.0)
            z = tl.load(trace_ptr + 5 * field + out, mask=rows, other=0.0)
            o = tl.load(trace_ptr + 6 * field + out, mask=rows, other=0.0)
        else:
            hidden = _load_before(hidden_ptr, output_ptr, leaf, before, is_first, rows)
            hidden = tl.where(kept, hidden, 0.0)
            i, f, z, o = _pre_activations(gates_ptr, at, rows, hidden, weights, H, D, PRECISION)
        forget = tl.exp(tl.where(kept & (old_n != 0.0), log_forget(f, EXP) + old_m, never) - m)
        write = tl.exp(i - m)
        z = _tanh(z)
        o = tl.sigmoid(o)

        d_h += tl.load(d_output_ptr + out, mask=rows, other=0.0).to(tl.float32)
        ratio = c / n
        by_cell = d_h * o / n
        d_c += by_cell
        d_n -= by_cell * ratio
        # Each gradient is stored and multiplied before the next is made: they need not be on chip together.
        kind: tl.constexpr = d_gates_ptr.dtype.element_ty
        gate = H * D
        d_o = (d_h * ratio * o * (1.0 - o)).to(kind)
        tl.store(d_gates_ptr + at + 3 * gate, d_o, mask=rows)
        d_f = ((d_c * old_c + d_n * old_n) * forget * forget_slope(f, EXP)).to(kind)
        tl.store(d_gates_ptr + at + gate, d_f, mask=rows)
        d_h = tl.dot(d_f, tl.trans(weights[1]), input_precision=PRECISION)
        d_h = tl.dot(d_o, tl.trans(weights[3]), acc=d_h, input_precision=PRECISION)
        d_i = ((d_c * z + d_n) * write).to(kind)
        tl.store(d_gates_ptr + at, d_i, mask=rows)
        d_h = tl.dot(d_i, tl.trans(weights[0]), acc=d_h, input_precision=PRECISION)
        d_z = (d_c * write * (1.0 - z * z)).to(kind)
        tl.store(d_gates_ptr + at + 2 * gate, d_z, mask=rows)
        d_h = tl.dot(d_z, tl.trans(weights[2]), acc=d_h, input_precision=PRECISION)
        d_h = tl.where(kept, d_h, 0.0)
        d_c = d_c * forget
        d_n = d_n * forget

    tl.store(d_cell_ptr + leaf, d_c, mask=rows)
    tl.store(d_normalizer_ptr + leaf, d_n, mask=rows)
    tl.store(d_hidden_ptr + leaf, d_h, mask=rows)
