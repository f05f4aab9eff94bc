"""Selective diagonal state spaces over a sequence, scanned in parallel (Gu and Dao 2023, Mamba, section 3)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.tracing import transformed


class SelectiveInputs(NamedTuple):
    """What a selective state space is given."""

    delta: Tensor
    """Step sizes, [B, T, I], at least zero."""
    x: Tensor
    """[B, T, I]"""
    rates: Tensor
    """-A, what decays per unit of delta, [N, I]."""
    write: Tensor
    """B, [B, T, N]"""
    read: Tensor
    """C, [B, T, N]"""
    initial: Tensor
    """h before the first step, [B, N, I]."""


def selective_scan(inputs: SelectiveInputs, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All y_t = C_t h_t with h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t.

    The backward pass is written by hand and keeps decays and states alone, not the results in between. Where that
    cannot serve, in traces, transforms of `torch.func`, forward-mode differentiation and gradients of gradients,
    `selective_recurrence` does.

    Args:
        inputs: of the state space; T may be zero.
        reset: bool [B, T] or None; true where h is emptied before the step.

    Returns:
        y [B, T, I] and the last h [B, N, I].
    """
    if inputs.x.numel() == 0:
        return inputs.x, inputs.initial
    # Autocast computes some of the inputs in half precision, and would do so with the sums over the states.
    inputs = SelectiveInputs(*(part.to(inputs.initial.dtype) for part in inputs))
    if transformed():
        return selective_recurrence(inputs, reset)
    if torch.is_grad_enabled() and any(part.requires_grad for part in inputs):
        return _SelectiveScan.apply(*inputs, reset)  # type: ignore[no-any-return, no-untyped-call]
    _, hidden = _forward(inputs, reset)
    return _times(inputs.read, hidden), hidden[:, -1].clone()


def selective_recurrence(inputs: SelectiveInputs, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`selective_scan` step by step, in operations that autograd and its transforms know."""
    delta, x, rates, write, read, initial = inputs
    decay = (-delta.unsqueeze(-2) * rates).exp()
    hidden, last = diagonal_recurrence(decay, _outer(write, delta * x), initial, reset)
    return _times(read, hidden), last


def _outer(states: Tensor, features: Tensor) -> Tensor:
    """[B, T, N] and [B, T, I] -> [B, T, N, I]: features lie innermost, being many."""
    return states.unsqueeze(-1) * features.unsqueeze(-2)


def _times(states: Tensor, x: Tensor) -> Tensor:
    """[B, T, N] and [B, T, N, I] -> [B, T, I]."""
    return (states.unsqueeze(-2) @ x).squeeze(-2).to(x.dtype)


def _forward(inputs: SelectiveInputs, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decays and states, [B, T, N, I] each."""
    delta, x, rates, write, _, initial = inputs
    decay = (delta.unsqueeze(-2) * -rates).exp_()
    hidden = _outer(write, delta * x)
    scan_in_place(decay, hidden, initial, reset)
    return decay, hidden


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        *parts, reset = arguments
        inputs = SelectiveInputs(*parts)
        decay, hidden = _forward(inputs, reset)
        ctx.save_for_backward(*inputs, reset, decay, hidden)
        return _times(inputs.read, hidden), hidden[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        *parts, reset, decay, hidden = ctx.saved_tensors
        inputs = SelectiveInputs(*parts)
        if torch.is_grad_enabled():
            # A gradient of this gradient may be asked for. As views, or one input's gradient would hold another's, of
            # which it may have been made.
            inputs = SelectiveInputs(*(part.view_as(part) for part in inputs))
            wanted = [part for part, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(selective_recurrence(inputs, reset), wanted, outer, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad),)
        delta, x, rates, write, read, initial = inputs
        d_y, d_last = (gradient.to(hidden.dtype) for gradient in outer)
        # what the loss gains by each h_t, by itself and by what follows from it
        gain = _outer(read, d_y)
        gain[:, -1] += d_last
        if gain.shape[1] > 1:
            later = None if reset is None else reset[:, 1:]
            scan_in_place(decay[:, 1:], gain[:, :-1], gain[:, -1], later, backwards=True)
        d_added = _times(write, gain)
        through = decay * gain
        if reset is not None:
            through.masked_fill_(reset[:, :, None, None], 0.0)
        d_initial = through[:, 0].clone()
        # with respect to the logarithm of the decay, -delta rates
        d_log = through
        d_log[:, 1:].mul_(hidden[:, :-1])
        d_log[:, 0].mul_(initial)
        if reset is not None:
            # what was emptied may have been NaN
            d_log.masked_fill_(reset[:, :, None, None], 0.0)
        return (
            d_added * x - (d_log * rates).sum(-2),
            d_added * delta,
            -(d_log * delta.unsqueeze(-2)).sum((0, 1)),
            (gain @ (delta * x).unsqueeze(-1)).squeeze(-1),
            (hidden @ d_y.unsqueeze(-1)).squeeze(-1),
            d_initial,
            None,
        )


# From so many numbers per step on, a CPU is as fast with them alone as with those of several steps at once.
_ENOUGH_FOR_A_CPU = 2048


def scan_in_place(
    decay: Tensor, terms: Tensor, initial: Tensor, reset: Tensor | None, *, backwards: bool = False
) -> None:
    """Turn terms into h_t = decay_t h_(t-1) + terms_t, in some 2 sqrt(T) steps that work on many times at once.

    The sequence is cut into about sqrt(T) chunks. Each is run through for what it adds to the state and what it leaves
    of the one before; then the states at their starts are known, and each is run through again. Every product is of
    decays in order, so nothing is divided by a small number. A CPU with enough to do at each step runs through once.

    Args:
        decay: [B, T, ...].
        terms: [B, T, ...], written over.
        initial: [B, ...], h before the first step.
        reset: bool [B, T] or None; true where h is emptied before the step; what it was may be NaN.
        backwards: from the last step to the first; `initial` is h after the last one.
    """
    T = terms.shape[1]
    length = T if terms.is_cpu and initial.numel() >= _ENOUGH_FOR_A_CPU else math.isqrt(T)
    whole = T // length * length
    cut, rest = (
        _Chunks.cut(decay[:, at], terms[:, at], reset if reset is None else reset[:, at], n, backwards)
        for at, n in ((slice(whole), length), (slice(whole, T), T - whole))
    )
    h = initial.unsqueeze(1)
    if backwards:
        cut.run(cut.begin(rest.run(h)))
    else:
        rest.run(cut.run(cut.begin(h))[:, -1:])


class _Chunks(NamedTuple):
    """Chunks of a sequence, scanned side by side: by place in the chunk, in the order of the scan."""

    decay: Sequence[Tensor]
    """[B, chunks, ...]"""
    terms: Sequence[Tensor]
    """[B, chunks, ...]"""
    starts: Sequence[Tensor | None]
    """[B, chunks, ...], which h are emptied before; None where it is known that none is."""
    backwards: bool
    """The order of the chunks."""

    @classmethod
    def cut(cls, decay: Tensor, terms: Tensor, reset: Tensor | None, length: int, backwards: bool) -> "_Chunks":
        """Chunks of that length from a sequence of a multiple of it, or of none."""
        order = slice(None, None, -1 if backwards else 1)

        def places(x: Tensor) -> tuple[Tensor, ...]:
            return x.view(len(x), -1, length, *x.shape[2:]).unbind(2)[order] if length else ()

        starts: list[Tensor | None] = [None] * length
        if reset is not None and length:
            masks = places(reset.reshape(*reset.shape, *(1,) * (terms.ndim - 2)))
            # Asking which places are free of starts would wait for another device.
            anywhere = reset.reshape(-1, length).any(0).tolist()[order] if reset.is_cpu else [True] * length
            starts = [mask if start else None for mask, start in zip(masks, anywhere, strict=True)]
        return cls(places(decay), places(terms), starts, backwards)

    def run(self, h: Tensor) -> Tensor:
        """Write h over the terms, given h before every chunk, [B, chunks, ...]; returns h after every chunk."""
        for factor, term, start in zip(self.decay, self.terms, self.starts, strict=True):
            h = term.addcmul_(factor, _kept(h, start))
        return h

    def begin(self, h: Tensor) -> Tensor:
        """h before every chunk, given h [B, 1, ...] before the first."""
        chunks = self.terms[0].shape[1]
        if chunks == 1:
            return h
        added, through, seen = self.terms[0], self.decay[0], self.starts[0]
        for factor, term, start in zip(self.decay[1:], self.terms[1:], self.starts[1:], strict=True):
            added = torch.addcmul(term, factor, _kept(added, start))
            through = through * factor
            seen = seen if start is None else start if seen is None else seen | start
        before = [h[:, 0]] * chunks
        order = range(chunks - 1, 0, -1) if self.backwards else range(chunks - 1)
        for chunk in order:
            carried = _kept(through[:, chunk] * before[chunk], None if seen is None else seen[:, chunk])
            before[chunk - 1 if self.backwards else chunk + 1] = added[:, chunk] + carried
        return torch.stack(before, 1)


def _kept(h: Tensor, starts: Tensor | None) -> Tensor:
    return h if starts is None else h.masked_fill(starts, 0.0)


def diagonal_recurrence(
    decay: Tensor, terms: Tensor, initial: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `scan_in_place` computes, step by step, in operations that autograd and its transforms know.

    Args:
        decay: [B, T, ...].
        terms: [B, T, ...].
        initial: [B, ...], h before the first step.
        reset: bool [B, T] or None; true where h is emptied before the step.

    Returns:
        h [B, T, ...] and the last of them [B, ...].
    """
    h, states = initial, []
    for t, (factor, term) in enumerate(zip(decay.unbind(1), terms.unbind(1), strict=True)):
        h = factor * _kept(h, None if reset is None else reset[:, t].view(-1, *(1,) * (h.ndim - 1))) + term
        states.append(h)
    return torch.stack(states, 1), h
