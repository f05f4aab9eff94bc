"""The sLSTM as a scan over time with its backward pass written by hand, everything but the recurrence in one batch."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.slstm_reference import slstm_recurrence
from xlstm_rl.kernels.states import ForgetActivation, SLSTMState, empty_slstm_state, log_forget, zero_where
from xlstm_rl.kernels.tracing import is_plain, transformed


def slstm_scan(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, SLSTMState]:
    """Scan form, arguments and results as `slstm_sequence`; differentiable once."""
    if transformed() or not all(map(is_plain, (gates, recurrent, *(state or ())))):
        return slstm_recurrence(gates, recurrent, state, reset, forget_activation)
    T = gates.shape[1]
    state = empty_slstm_state(gates) if state is None else state
    if T == 0:
        return torch.zeros_like(gates[:, :, 0]), state
    if reset is not None:
        # What an episode start throws away may be NaN, which a product with zero would keep.
        state = SLSTMState._make(zero_where(reset[:, 0], leaf) for leaf in state)
    if torch.is_grad_enabled() and _requires_grad(gates, recurrent, state):
        stabilizer = state.stabilizer.detach()
        hidden, *leaves = _Scan.apply(  # type: ignore[no-untyped-call]
            gates, recurrent, state.cell, state.normalizer, state.hidden, stabilizer, reset, forget_activation
        )
        return hidden, SLSTMState(*leaves)
    if T == 1:
        return _single_step(gates, recurrent, state, forget_activation)
    trace = _run(gates, recurrent, state, reset, forget_activation, keep=False)
    return _hidden(trace), _final_state(trace)


def _requires_grad(gates: Tensor, recurrent: Tensor, state: SLSTMState) -> bool:
    return (
        gates.requires_grad
        or recurrent.requires_grad
        or state.cell.requires_grad
        or state.normalizer.requires_grad
        or state.hidden.requires_grad
    )


def _single_step(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, SLSTMState]:
    """The recurrence for T = 1 without gradients, in as few operations as possible: acting spends its time here."""
    cell, normalizer, hidden, stabilizer = state
    feedback = torch.matmul(recurrent, hidden.permute(1, 2, 0))  # [4, H, D, B]
    input_gate, forget_gate, cell_input, output_gate = (gates[:, 0] + feedback.permute(3, 0, 1, 2)).unbind(1)

    # Minus infinity makes the forget factor of an empty unit exactly zero.
    decayed = log_forget(forget_gate, forget_activation) + stabilizer.masked_fill(normalizer == 0, float("-inf"))
    stabilizer = torch.maximum(decayed, input_gate)
    forget = decayed.sub_(stabilizer).exp_()
    write = (input_gate - stabilizer).exp_()
    cell = (cell * forget).addcmul_(write, torch.tanh(cell_input))
    normalizer = torch.addcmul(write, normalizer, forget)
    hidden = torch.div(cell, normalizer).mul_(torch.sigmoid(output_gate))
    return hidden[:, None], SLSTMState(cell, normalizer, hidden, stabilizer)


class _Trace(NamedTuple):
    """What a scan leaves behind; time first, then heads, the layout that the recurrent product wants.

    Attributes:
        gates: [T, H, B, 4, D], pre-activations with the feedback added.
        memory: [T + 1, 2, H, B, D], cell and normalizer before and after each step.
        hidden: [T + 1, H, B, D].
        factors: [T, 2, H, B, D], write and forget factor.
        stabilizer: [H, B, D], after the last step.
    """

    gates: Tensor
    memory: Tensor
    hidden: Tensor
    factors: Tensor
    stabilizer: Tensor


def _run(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
    keep: bool,
) -> _Trace:
    """Run the recurrence; with `keep` false factors and memory hold one step only, for use without gradients."""
    B, T, _, H, D = gates.shape
    trace = _Trace(
        # A copy even where the layout is right already: the feedback is added in place.
        gates=gates.permute(1, 3, 0, 2, 4).clone(memory_format=torch.contiguous_format),
        memory=gates.new_empty(T + 1 if keep else 1, 2, H, B, D),
        hidden=gates.new_empty(T + 1, H, B, D),
        factors=gates.new_empty(T if keep else 1, 2, H, B, D),
        stabilizer=gates.new_empty(H, B, D),
    )
    # Heads in front of rows from here on: the recurrent product of all heads is one batched product.
    trace.memory[0, 0].copy_(state.cell.transpose(0, 1))
    trace.memory[0, 1].copy_(state.normalizer.transpose(0, 1))
    trace.hidden[0].copy_(state.hidden.transpose(0, 1))
    # Minus infinity makes the forget factor of an empty unit exactly zero.
    stabilizer = state.stabilizer.transpose(0, 1).masked_fill(trace.memory[0, 1] == 0, float("-inf"))
    weight = _recurrent_matrix(recurrent)
    # Room that every step writes anew. Write and forget factor lie side by side, so that one subtraction and one
    # exponential make both.
    write_and_decay = gates.new_empty(2, H, B, D)
    cell_input = gates.new_empty(H, B, D)
    if keep:
        before, after, factors = _steps(trace.memory[:-1]), _steps(trace.memory[1:]), _steps(trace.factors)
    else:
        # one place for all steps: each reads what the one before wrote, and writes over it
        before, after, factors = (itertools.repeat(x[0], T) for x in (trace.memory, trace.memory, trace.factors))
    pre_activations = _steps(trace.gates.view(T, H, B, 4 * D))
    hiddens = (_steps(trace.hidden[:-1]), _steps(trace.hidden[1:]))

    for g, hidden, new_hidden, memory, new_memory, factor, mask in zip(
        pre_activations, *hiddens, before, after, factors, _starts(reset, T), strict=True
    ):
        if mask is not None:
            # What an episode start throws away may be NaN, which a product with zero would keep.
            hidden, memory = hidden.masked_fill(mask, 0.0), memory.masked_fill(mask, 0.0)
            stabilizer = stabilizer.masked_fill(mask, float("-inf"))
        # in place: the trace needs the gates with the feedback
        torch.baddbmm(g, hidden, weight, out=g)
        input_gate, forget_gate, z, output_gate = g.chunk(4, -1)
        torch.add(log_forget(forget_gate, forget_activation), stabilizer, out=write_and_decay[1])
        write_and_decay[0].copy_(input_gate)
        stabilizer = torch.maximum(write_and_decay[0], write_and_decay[1])
        # views of `factor`, and below of `new_memory`: what is written there is in the trace at once
        write, forget = torch.sub(write_and_decay, stabilizer, out=factor).exp_().unbind(0)
        cell, normalizer = torch.mul(memory, forget, out=new_memory).unbind(0)
        cell.addcmul_(write, torch.tanh(z, out=cell_input))
        normalizer.add_(write)
        torch.div(cell, normalizer, out=new_hidden).mul_(torch.sigmoid(output_gate))
    return trace._replace(stabilizer=stabilizer)


def _steps(x: Tensor, *, backward: bool = False) -> Iterator[Tensor]:
    """The steps of x [T, ...], from the last on if `backward`.

    A few at a time: Python's garbage collector would look at the views of all steps again and again.
    """
    pieces = torch.split(x, 256)
    for piece in reversed(pieces) if backward else pieces:
        steps = piece.unbind(0)
        yield from reversed(steps) if backward else steps


def _recurrent_matrix(recurrent: Tensor) -> Tensor:
    """[4, H, D (out), D (in)] -> [H, D (in), 4 * D (out)]."""
    _, H, D, _ = recurrent.shape
    return recurrent.permute(1, 3, 0, 2).reshape(H, D, 4 * D)


def _starts(reset: Tensor | None, T: int, *, backward: bool = False) -> Iterator[Tensor | None]:
    """Per step the mask [1, B, 1] of rows that start an episode, or None where it is known that no row does."""
    if reset is None:
        return itertools.repeat(None, T)
    masks = _steps(reset.t()[:, None, :, None], backward=backward)
    if reset.device.type != "cpu":
        # Asking which steps are free of resets would wait for the device.
        return masks
    any_start = reset.any(0)
    known = (any_start.flip(0) if backward else any_start).tolist()
    return (mask if start else None for mask, start in zip(masks, known, strict=True))


def _hidden(trace: _Trace) -> Tensor:
    """[B, T, H, D]."""
    return trace.hidden[1:].permute(2, 0, 1, 3).clone(memory_format=torch.contiguous_format)


def _final_state(trace: _Trace) -> SLSTMState:
    leaves = (trace.memory[-1, 0], trace.memory[-1, 1], trace.hidden[-1], trace.stabilizer)
    return SLSTMState(*(leaf.transpose(0, 1).clone(memory_format=torch.contiguous_format) for leaf in leaves))


class _Scan(torch.autograd.Function):
    """The scan with its backward pass through time; the stabilizer is a constant there, as it cancels exactly."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        recurrent: Tensor,
        cell: Tensor,
        normalizer: Tensor,
        hidden: Tensor,
        stabilizer: Tensor,
        reset: Tensor | None,
        forget_activation: ForgetActivation,
    ) -> tuple[Tensor, ...]:
        """Run the scan and keep its trace."""
        state = SLSTMState(cell, normalizer, hidden, stabilizer)
        trace = _run(gates, recurrent, state, reset, forget_activation, keep=True)
        final = _final_state(trace)
        ctx.save_for_backward(recurrent, reset, *trace)
        ctx.forget_activation = forget_activation
        ctx.mark_non_differentiable(final.stabilizer)
        return _hidden(trace), *final

    @staticmethod
    def backward(
        ctx: Any, d_hidden: Tensor, d_cell: Tensor, d_normalizer: Tensor, d_last: Tensor, d_stabilizer: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Walk the trace back; gradients in the order of the forward arguments."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the sLSTM scan cannot be differentiated twice; use backend='reference' for create_graph"
            )
        recurrent, reset, *fields = ctx.saved_tensors
        trace = _Trace(*fields)
        T, H, B, _, D = trace.gates.shape
        slopes = _slopes(trace, reset, ctx.forget_activation)
        d_gates = torch.empty_like(trace.gates)
        d_memory = torch.stack((d_cell.transpose(0, 1), d_normalizer.transpose(0, 1)))  # [2, H, B, D]
        d_feedback = d_last.transpose(0, 1)
        weight = _recurrent_matrix(recurrent).transpose(1, 2).contiguous()
        walk = functools.partial(_steps, backward=True)
        outer = walk(d_hidden.permute(1, 2, 0, 3).contiguous())
        gradients = (walk(d_gates.view(T, H, B, 4 * D)), walk(d_gates))
        starts = _starts(reset, T, backward=True)

        for outside, flat, split, from_hidden, from_cell, from_normalizer, from_output, forget, mask in zip(
            outer, *gradients, *map(walk, slopes), walk(trace.factors[:, 1]), starts, strict=True
        ):
            d_h = outside + d_feedback
            d_memory = torch.addcmul(d_memory, from_hidden, d_h)
            torch.mul(d_memory[0, :, :, None], from_cell, out=split[:, :, :3])
            split[:, :, :2].addcmul_(d_memory[1, :, :, None], from_normalizer)
            torch.mul(d_h, from_output, out=split[:, :, 3])
            d_feedback = torch.bmm(flat, weight)
            if mask is not None:
                d_feedback = d_feedback.masked_fill_(mask, 0.0)
            d_memory = d_memory * forget
            if mask is not None:
                d_memory = d_memory.masked_fill_(mask, 0.0)

        d_cell, d_normalizer = d_memory.transpose(1, 2).unbind(0)
        d_recurrent = _recurrent_gradient(trace.hidden[:-1], d_gates, reset)
        return (
            d_gates.permute(2, 0, 3, 1, 4),
            d_recurrent,
            d_cell,
            d_normalizer,
            d_feedback.transpose(0, 1),
            *[None] * 3,
        )


class _Slopes(NamedTuple):
    """Local derivatives of every step.

    Attributes:
        hidden: [T, 2, H, B, D], of the output with respect to cell and normalizer.
        cell: [T, H, B, 3, D], of the cell with respect to the pre-activations i, f, z.
        normalizer: [T, H, B, 2, D], of the normalizer with respect to the pre-activations i, f.
        output: [T, H, B, D], of the output with respect to the pre-activation o.
    """

    hidden: Tensor
    cell: Tensor
    normalizer: Tensor
    output: Tensor


def _slopes(trace: _Trace, reset: Tensor | None, forget_activation: ForgetActivation) -> _Slopes:
    _, forget_gate, cell_input, output_gate = trace.gates.unbind(-2)  # [T, H, B, D] each
    write, forget = trace.factors.unbind(1)
    if forget_activation == "sigmoid":
        forget = forget * torch.sigmoid(-forget_gate)
    cell_input, output_gate, closed = torch.tanh(cell_input), torch.sigmoid(output_gate), torch.sigmoid(-output_gate)
    before, after = trace.memory[:-1], trace.memory[1:]
    if reset is not None:
        before = before.masked_fill(reset.t()[:, None, None, :, None], 0.0)
    ratio = after[:, 0] / after[:, 1]
    by_cell = output_gate / after[:, 1]
    return _Slopes(
        hidden=torch.stack((by_cell, -by_cell * ratio), 1),
        cell=torch.stack((write * cell_input, before[:, 0] * forget, write * (1 - cell_input * cell_input)), -2),
        normalizer=torch.stack((write, before[:, 1] * forget), -2),
        output=ratio * output_gate * closed,
    )


def _recurrent_gradient(hidden: Tensor, d_gates: Tensor, reset: Tensor | None) -> Tensor:
    """Gradient of the recurrent weights [4, H, D, D] from hidden [T, H, B, D] before and d_gates of every step."""
    T, H, B, _, D = d_gates.shape
    if reset is not None:
        hidden = hidden.masked_fill(reset.t()[:, None, :, None], 0.0)
    left = d_gates.permute(1, 3, 4, 0, 2).reshape(H, 4 * D, T * B)
    right = hidden.transpose(0, 1).reshape(H, T * B, D)
    return torch.bmm(left, right).view(H, 4, D, D).transpose(0, 1)
