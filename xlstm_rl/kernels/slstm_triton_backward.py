"""The sLSTM backward on a GPU: one launch walks the steps of 16 rows and a head back, the recurrent weights as forward.

The gradient of the weights is one matrix product over all steps, outside.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.gates_triton import forget_slope, log_forget
from xlstm_rl.kernels.slstm_triton import ROWS, add_product, load_weights, own_rows, pre_activations, tanh, units
from xlstm_rl.kernels.states import SLSTMState
from xlstm_rl.kernels.triton_arguments import SLSTMInputs, SLSTMMemory, SLSTMSaved
from xlstm_rl.kernels.triton_configs import launch_for


class Gradients(NamedTuple):
    """Gradients of the inputs in their dtype and, float32, of the state before the first step."""

    gates: Tensor
    recurrent: Tensor
    cell: Tensor
    normalizer: Tensor
    hidden: Tensor


def backward(
    d_output: Tensor,
    d_last: SLSTMMemory,
    inputs: SLSTMInputs,
    state: SLSTMState,
    saved: SLSTMSaved,
    forget_activation: str,
) -> Gradients:
    """Differentiate `forward` with `keep`; all tensors contiguous, T at least 1."""
    B, T, _, H, D = inputs.gates.shape
    d_gates = torch.empty_like(inputs.gates)
    d_before = SLSTMMemory(*(torch.empty_like(leaf) for leaf in d_last))
    launch = launch_for("slstm_backward", inputs.gates)
    tensors = (inputs.as_bytes(), state, saved, d_output, d_last, d_gates, d_before)
    fixed = (D, ROWS, forget_activation == "exp", len(saved.trace), launch.streams, launch.precision)
    with torch.cuda.device_of(inputs.gates):
        _backward[(triton.cdiv(B, ROWS), H)](*tensors, B, T, H, *fixed, **launch.options)
    return Gradients(d_gates, _recurrent_gradient(d_gates, saved.output, state.hidden, inputs.reset), *d_before)


def _recurrent_gradient(d_gates: Tensor, output: Tensor, hidden: Tensor, reset: Tensor) -> Tensor:
    """Gradient [4, H, D, D] of the recurrent weights, one matrix product over all steps of all rows."""
    B, T, _, H, D = d_gates.shape
    before = torch.cat((hidden[:, None].to(output.dtype), output[:, :-1]), 1).masked_fill(reset[..., None, None], 0.0)
    left = d_gates.permute(3, 2, 4, 0, 1).reshape(H, 4 * D, B * T)
    right = before.permute(2, 0, 1, 3).reshape(H, B * T, D)
    return torch.bmm(left, right).view(H, 4, D, D).transpose(0, 1).contiguous()


@triton.jit
def _load_before(first_ptr, later_ptr, leaf, before, is_first, rows):
    """What a leaf was before a step: the initial state before the first one, the trace elsewhere."""
    initial = tl.load(first_ptr + leaf, mask=rows & is_first, other=0.0).to(tl.float32)
    return initial + tl.load(later_ptr + before, mask=rows & (is_first == 0), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B", "T", "H"])
def _backward(
    inputs,
    state,
    saved,
    d_output_ptr,
    d_last,
    d_gates_ptr,
    d_before,
    B,
    T,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EXP: tl.constexpr,
    FIELDS: tl.constexpr,
    STREAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reverse order, the gates from the trace or computed again; the stabilizer is a constant, it cancels."""
    never: tl.constexpr = -float("inf")
    H = H.to(tl.int64)
    b, rows = own_rows(B, ROWS)
    leaf = units(b, H, D)
    field = H * D * B * T
    trace_ptr = saved.trace
    d_c = tl.load(d_last.cell + leaf, mask=rows, other=0.0)
    d_n = tl.load(d_last.normalizer + leaf, mask=rows, other=0.0)
    d_h = tl.load(d_last.hidden + leaf, mask=rows, other=0.0)
    weights = load_weights(inputs.recurrent, H, D, STREAMS)

    for back in range(0, T):
        step = b * T + (T - 1 - back)
        # Not a comparison of scalars: a loop variable of the interpreter is a plain number.
        is_first = (step == b * T)[:, None]
        kept = (tl.load(inputs.reset + step, mask=b < B, other=0) == 0)[:, None]
        at = units(step, H, D)
        before = at - H * D
        c = tl.load(trace_ptr + at, mask=rows, other=0.0)
        n = tl.load(trace_ptr + field + at, mask=rows, other=1.0)
        m = tl.load(trace_ptr + 2 * field + at, mask=rows, other=0.0)
        old_c = _load_before(state.cell, trace_ptr, leaf, before, is_first, rows)
        old_n = _load_before(state.normalizer, trace_ptr + field, leaf, before, is_first, rows)
        old_m = _load_before(state.stabilizer, trace_ptr + 2 * field, leaf, before, is_first, rows)
        if FIELDS == 7:
            i = tl.load(trace_ptr + 3 * field + at, mask=rows, other=0.0)
            f = tl.load(trace_ptr + 4 * field + at, mask=rows, other=0.0)
            z = tl.load(trace_ptr + 5 * field + at, mask=rows, other=0.0)
            o = tl.load(trace_ptr + 6 * field + at, mask=rows, other=0.0)
        else:
            hidden = _load_before(state.hidden, saved.output, leaf, before, is_first, rows)
            hidden = tl.where(kept, hidden, 0.0)
            i, f, z, o = pre_activations(inputs.gates, step, rows, hidden, weights, H, D, ROWS, STREAMS, PRECISION)
        forget = tl.exp(tl.where(kept & (old_n != 0.0), log_forget(f, EXP) + old_m, never) - m)
        write = tl.exp(i - m)
        z = tanh(z)
        o = tl.sigmoid(o)

        d_h += tl.load(d_output_ptr + at, mask=rows, other=0.0).to(tl.float32)
        ratio = c / n
        by_cell = d_h * o / n
        d_c += by_cell
        d_n -= by_cell * ratio
        # Each gradient is stored and multiplied before the next is made: they need not be on chip together.
        kind: tl.constexpr = d_gates_ptr.dtype.element_ty
        gate = H * D
        d_gate_ptr = d_gates_ptr + units(step * 4, H, D)
        d_o = (d_h * ratio * o * (1.0 - o)).to(kind)
        tl.store(d_gate_ptr + 3 * gate, d_o, mask=rows)
        d_f = ((d_c * old_c + d_n * old_n) * forget * forget_slope(f, EXP)).to(kind)
        tl.store(d_gate_ptr + gate, d_f, mask=rows)
        d_h = add_product(tl.zeros_like(d_h), d_f, weights[1], ROWS, D, True, STREAMS, PRECISION)
        d_h = add_product(d_h, d_o, weights[3], ROWS, D, True, STREAMS, PRECISION)
        d_i = ((d_c * z + d_n) * write).to(kind)
        tl.store(d_gate_ptr, d_i, mask=rows)
        d_h = add_product(d_h, d_i, weights[0], ROWS, D, True, STREAMS, PRECISION)
        d_z = (d_c * write * (1.0 - z * z)).to(kind)
        tl.store(d_gate_ptr + 2 * gate, d_z, mask=rows)
        d_h = add_product(d_h, d_z, weights[2], ROWS, D, True, STREAMS, PRECISION)
        d_h = tl.where(kept, d_h, 0.0)
        d_c = d_c * forget
        d_n = d_n * forget

    tl.store(d_before.cell + leaf, d_c, mask=rows)
    tl.store(d_before.normalizer + leaf, d_n, mask=rows)
    tl.store(d_before.hidden + leaf, d_h, mask=rows)
