"""The sLSTM forward on a GPU: one launch walks all the steps of 16 rows and a head; acting is the same with T = 1.

The recurrent weights stay on chip where they fit; elsewhere each step streams them from the GPU's cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.gates_triton import log_forget
from xlstm_rl.kernels.states import SLSTMState
from xlstm_rl.kernels.triton_arguments import SLSTMInputs
from xlstm_rl.kernels.triton_configs import launch_for, slstm_trace_fields

# The smallest side of a matrix product on the tensor cores.
ROWS = 16


class Forward(NamedTuple):
    """What the forward pass gives.

    Attributes:
        output: [B, T, H, D] in the dtype of the gates.
        last: the state after the last step, float32.
        trace: float32 [F, B, T, H, D], see `slstm_trace_fields`; without `keep` its T is 0.
    """

    output: Tensor
    last: SLSTMState
    trace: Tensor


def forward(inputs: SLSTMInputs, state: SLSTMState, forget_activation: str, keep: bool) -> Forward:
    """Run a sequence; inputs contiguous, the state in float32; T is at least 1."""
    B, T, _, H, D = inputs.gates.shape
    fields = slstm_trace_fields(inputs.gates)
    last = SLSTMState(*(torch.empty_like(leaf) for leaf in state))
    trace = state.cell.new_empty(fields, B, T if keep else 0, H, D)
    outputs = Forward(inputs.gates.new_empty(B, T, H, D), last, trace)
    launch = launch_for("slstm_forward", inputs.gates)
    fixed = (D, ROWS, forget_activation == "exp", fields if keep else 0, launch.streams, launch.precision)
    with torch.cuda.device_of(inputs.gates):
        _forward[(triton.cdiv(B, ROWS), H)](inputs.as_bytes(), state, outputs, B, T, H, *fixed, **launch.options)
    return outputs


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def own_rows(B, ROWS: tl.constexpr):
    """Rows [ROWS] of this program in the batch, and which there are [ROWS, 1]."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return b, (b < B)[:, None]


@triton.jit
def units(row, H, D: tl.constexpr):
    """Offsets [ROWS, D] of this program's units in a tensor whose last dimensions are rows, heads and units."""
    return (row[:, None] * H + tl.program_id(1)) * D + tl.arange(0, D)[None, :]


@triton.jit
def load_weights(recurrent_ptr, H, D: tl.constexpr, STREAMS: tl.constexpr):
    """The weights of the four gates [D (in), D (out)] each; with STREAMS where those of this head begin."""
    d = tl.arange(0, D)
    head_ptr = recurrent_ptr + tl.program_id(1).to(tl.int64) * D * D
    if STREAMS:
        weights = (head_ptr, head_ptr + H * D * D, head_ptr + 2 * H * D * D, head_ptr + 3 * H * D * D)
    else:
        at = head_ptr + d[None, :] * D + d[:, None]
        gate = H * D * D
        weights = (tl.load(at), tl.load(at + gate), tl.load(at + 2 * gate), tl.load(at + 3 * gate))
    return weights


@triton.jit
def add_product(
    total,
    x,
    weight,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    STREAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` and x [ROWS, D] times a gate's weights, or times those turned, as the backward pass has them."""
    if STREAMS:
        # Half of them at a time, the other on its way: unrolled, they are more than the registers hold.
        half: tl.constexpr = D // 2
        d = tl.arange(0, D)[None, :]
        k = tl.arange(0, half)[:, None]
        at = weight + (k * D + d if TURNED else d * D + k)
        halves = tl.reshape(x.to(tl.float32), (ROWS, 2, half))
        which = tl.arange(0, 2)[None, :, None]
        for part in tl.range(0, 2, num_stages=2):
            left = tl.sum(tl.where(which == part, halves, 0.0), 1).to(x.dtype)
            right = tl.load(at + part * (half * D if TURNED else half))
            total = tl.dot(left, right, acc=total, input_precision=PRECISION)
    else:
        total = tl.dot(x, tl.trans(weight) if TURNED else weight, acc=total, input_precision=PRECISION)
    return total


@triton.jit
def pre_activation(
    gates_ptr,
    at,
    rows,
    hidden,
    weights,
    gate: tl.constexpr,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STREAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A gate [ROWS, D] of a step with the feedback added."""
    x = tl.load(gates_ptr + at + gate * H * D, mask=rows, other=0.0)
    return add_product(x.to(tl.float32), hidden.to(x.dtype), weights[gate], ROWS, D, False, STREAMS, PRECISION)


@triton.jit
def pre_activations(
    gates_ptr,
    step,
    rows,
    hidden,
    weights,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STREAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All four gates [ROWS, D] of a step with the feedback added."""
    at = units(step * 4, H, D)
    i = pre_activation(gates_ptr, at, rows, hidden, weights, 0, H, D, ROWS, STREAMS, PRECISION)
    f = pre_activation(gates_ptr, at, rows, hidden, weights, 1, H, D, ROWS, STREAMS, PRECISION)
    z = pre_activation(gates_ptr, at, rows, hidden, weights, 2, H, D, ROWS, STREAMS, PRECISION)
    o = pre_activation(gates_ptr, at, rows, hidden, weights, 3, H, D, ROWS, STREAMS, PRECISION)
    return i, f, z, o


@triton.jit
def _store_fields(trace_ptr, at, field, rows, values, FIRST: tl.constexpr):
    for k in tl.static_range(len(values)):
        tl.store(trace_ptr + (FIRST + k) * field + at, values[k], mask=rows)


@triton.jit(do_not_specialize=["B", "T", "H"])
def _forward(
    inputs,
    state,
    outputs,
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
    """One program per 16 rows and head walks all steps."""
    never: tl.constexpr = -float("inf")
    H = H.to(tl.int64)
    b, rows = own_rows(B, ROWS)
    leaf = units(b, H, D)
    field = H * D * B * T
    c = tl.load(state.cell + leaf, mask=rows, other=0.0)
    n = tl.load(state.normalizer + leaf, mask=rows, other=0.0)
    hidden = tl.load(state.hidden + leaf, mask=rows, other=0.0)
    # Minus infinity makes the forget factor of an empty unit exactly zero.
    m = tl.where(n == 0.0, never, tl.load(state.stabilizer + leaf, mask=rows, other=0.0))
    weights = load_weights(inputs.recurrent, H, D, STREAMS)

    for t in range(0, T):
        step = b * T + t
        kept = (tl.load(inputs.reset + step, mask=b < B, other=0) == 0)[:, None]
        hidden = tl.where(kept, hidden, 0.0)
        i, f, z, o = pre_activations(inputs.gates, step, rows, hidden, weights, H, D, ROWS, STREAMS, PRECISION)
        decayed = tl.where(kept, log_forget(f, EXP) + m, never)
        m = tl.maximum(decayed, i)
        forget = tl.exp(decayed - m)
        write = tl.exp(i - m)
        # An episode start may throw away anything, and zero times NaN is NaN.
        c = tl.where(kept, forget * c, 0.0) + write * tanh(z)
        n = tl.where(kept, forget * n, 0.0) + write
        hidden = tl.sigmoid(o) * c / n
        at = units(step, H, D)
        tl.store(outputs.output + at, hidden.to(outputs.output.dtype.element_ty), mask=rows)
        if FIELDS > 0:
            _store_fields(outputs.trace, at, field, rows, (c, n, m), 0)
        if FIELDS == 7:
            _store_fields(outputs.trace, at, field, rows, (i, f, z, o), 3)

    tl.store(outputs.last.cell + leaf, c, mask=rows)
    tl.store(outputs.last.normalizer + leaf, n, mask=rows)
    tl.store(outputs.last.hidden + leaf, hidden, mask=rows)
    tl.store(outputs.last.stabilizer + leaf, m, mask=rows)
