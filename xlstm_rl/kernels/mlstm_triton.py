"""The mLSTM forward on a GPU: one launch per sequence, the matrix memory on chip from the first step to the last."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_rl.kernels.chunks_triton import (
    chunk_decays,
    chunk_stabilizer,
    chunk_weights,
    least_divisor,
    load_chunk,
    load_columns,
    memory_places,
    spoil_gates,
    store_columns,
    store_steps,
    write_chunk,
)
from xlstm_rl.kernels.gates_triton import log_forget
from xlstm_rl.kernels.states import MLSTMState
from xlstm_rl.kernels.triton_arguments import MLSTMInputs
from xlstm_rl.kernels.triton_configs import launch_for


class Forward(NamedTuple):
    """What the forward pass gives.

    Attributes:
        hidden: [B, T, H, D] in the dtype of q.
        last: the state after the last step, float32.
        trace: float32 [2, B, T, H], stabilizer and `n . q` of every step; without `keep` its T is 0.
    """

    hidden: Tensor
    last: MLSTMState
    trace: Tensor


def forward(inputs: MLSTMInputs, state: MLSTMState, forget_activation: str, keep: bool) -> Forward:
    """Run a sequence; inputs contiguous, q, k and v of one width, the state in float32; T is at least 1."""
    B, T, H, D = inputs.q.shape
    last = MLSTMState(*(torch.empty_like(leaf) for leaf in state))
    outputs = Forward(torch.empty_like(inputs.v), last, state.cell.new_empty(2, B, T if keep else 0, H))
    exponential = forget_activation == "exp"
    launch = launch_for("mlstm_step" if T == 1 else "mlstm_forward", inputs.q)
    grid = (B * H, D // launch.share)
    with torch.cuda.device_of(inputs.q):
        if T == 1:
            fixed: tuple[object, ...] = (D, launch.share, exponential, keep)
            _step[grid](inputs.as_bytes(), state, outputs, H, *fixed, **launch.options)
        else:
            fixed = (D, launch.share, launch.chunk, exponential, keep, launch.precision)
            _sequence[grid](inputs.as_bytes(), state, outputs, T, H, *fixed, **launch.options)
    return outputs


@triton.jit(do_not_specialize=["T", "H"])
def _sequence(
    inputs,
    state,
    outputs,
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
    d = tl.arange(0, D)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    # What does not belong to columns is stored by the first program of a head.
    first = tl.program_id(1) == 0
    tile, vector = memory_places(d, column, D)
    C = tl.load(state.cell + tile)
    n = tl.load(state.normalizer + vector)
    m = tl.load(state.stabilizer + head)
    field = tl.num_programs(0).to(tl.int64) * T

    for start in range(0, T, L):
        row, valid, input_gate, _, log_decay, reset = load_chunk(inputs, start, T, H, L, EXP)
        q = load_columns(inputs.q, row, d, valid, D)
        k = load_columns(inputs.k, row, d, valid, D)
        v = load_columns(inputs.v, row, column, valid, D)
        v, input_gate = spoil_gates(v, input_gate)
        decays = chunk_decays(log_decay, reset, L)
        _, _, _, _, segment, _, sees = decays
        stabilizer = chunk_stabilizer(decays, input_gate, log_decay, reset, m, EXP)
        m_end = tl.max(tl.where(tl.arange(0, L) == L - 1, stabilizer, 0.0), 0)
        inside, read, write, keep = chunk_weights(decays, input_gate, m, stabilizer, m_end, D**-0.5)

        # Chosen, not multiplied by zero: what other episodes hold may be anything.
        weight = tl.where(sees, tl.dot(q, tl.trans(k), input_precision=PRECISION) * inside, 0.0)
        total = tl.dot(q, C.to(q.dtype), input_precision=PRECISION) * read[:, None]
        total = tl.where((segment == 0)[:, None], total, 0.0)
        total = tl.dot(weight.to(v.dtype), v, acc=total, input_precision=PRECISION)
        carried = tl.where(segment == 0, tl.sum(q.to(tl.float32) * n[None, :], 1) * read, 0.0)
        product = tl.sum(weight, 1) + carried
        hidden = total / tl.maximum(tl.abs(product), least_divisor(stabilizer))[:, None]
        store_columns(outputs.hidden, hidden, row, column, valid, D)
        if KEEP:
            if first:
                store_steps(outputs.trace, stabilizer, row, valid)
                store_steps(outputs.trace + field, product, row, valid)

        C, n = write_chunk(C, n, k, v, decays, write, keep, PRECISION)
        m = m_end

    tl.store(outputs.last.cell + tile, C)
    if first:
        tl.store(outputs.last.normalizer + vector, n)
        tl.store(outputs.last.stabilizer + head, m)


@triton.jit(do_not_specialize=["H"])
def _step(
    inputs,
    state,
    outputs,
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
    tile, vector = memory_places(d, column, D)
    C = tl.load(state.cell + tile)
    n = tl.load(state.normalizer + vector)
    fresh = tl.load(inputs.reset + head // H) != 0
    m = tl.where(fresh, 0.0, tl.load(state.stabilizer + head))
    q = tl.load(inputs.q + vector).to(tl.float32)
    k = tl.load(inputs.k + vector).to(tl.float32)
    v = tl.load(inputs.v + head * D + column).to(tl.float32)
    input_gate = tl.load(inputs.input_gate + head).to(tl.float32)
    decayed = log_forget(tl.load(inputs.forget_gate + head).to(tl.float32), EXP) + m

    m = tl.maximum(tl.maximum(decayed, input_gate), 0.0)
    keep = tl.exp(decayed - m)
    written = k * (tl.exp(input_gate - m) * D**-0.5)
    C = tl.where(fresh, 0.0, C * keep) + written[:, None] * v[None, :]
    n = tl.where(fresh, 0.0, n * keep) + written
    product = tl.sum(q * n, 0)
    hidden = tl.sum(q[:, None] * C, 0) / tl.maximum(tl.abs(product), least_divisor(m))
    tl.store(outputs.hidden + head * D + column, hidden.to(outputs.hidden.dtype.element_ty))
    tl.store(outputs.last.cell + tile, C)
    if tl.program_id(1) == 0:
        tl.store(outputs.last.normalizer + vector, n)
        tl.store(outputs.last.stabilizer + head, m)
        if KEEP:
            tl.store(outputs.trace + head, m)
            tl.store(outputs.trace + tl.num_programs(0) + head, product)
