"""Selective state spaces over a sequence equal their equation, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from tests.conftest import assert_close
from xlstm_rl.kernels.selective_scan import SelectiveInputs, selective_scan


def made(B: int, T: int, I: int, N: int, seed: int = 0, starts: float = 0.2) -> tuple[SelectiveInputs, Tensor]:  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = SelectiveInputs(
        random(B, T, I).abs(), random(B, T, I), random(N, I).abs(), random(B, T, N), random(B, T, N), random(B, N, I)
    )
    return inputs, torch.rand(B, T, generator=generator) < starts


def by_its_equation(inputs: SelectiveInputs, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t and y_t = C_t h_t, number by number."""
    delta, x, rates, write, read, initial = inputs
    B, T, width = x.shape
    y, last = torch.zeros_like(x), torch.zeros_like(initial)
    for b in range(B):
        for i in range(width):
            for n in range(len(rates)):
                h = float(initial[b, n, i])
                for t in range(T):
                    h = 0.0 if reset is not None and reset[b, t] else h
                    h = h * float(torch.exp(-delta[b, t, i] * rates[n, i])) + float(
                        delta[b, t, i] * write[b, t, n] * x[b, t, i]
                    )
                    y[b, t, i] += read[b, t, n] * h
                last[b, n, i] = h
    return y, last


@given(T=st.integers(1, 20), starts=st.sampled_from([None, 0.0, 0.1, 1.0]), seed=st.integers(0, 99))
def test_outputs_follow_the_equation(T: int, starts: float | None, seed: int) -> None:
    inputs, reset = made(2, T, 3, 2, seed, starts or 0.0)
    arguments = (inputs, None if starts is None else reset)
    assert_close(selective_scan(*arguments), by_its_equation(*arguments))


def test_gradients_are_those_of_differences() -> None:
    inputs, reset = made(2, 5, 2, 2)
    parts = SelectiveInputs(*(part.requires_grad_() for part in inputs))
    assert torch.autograd.gradcheck(lambda *p: selective_scan(SelectiveInputs(*p), reset), tuple(parts))


def test_what_was_before_an_episode_start_may_be_anything() -> None:
    inputs, _ = made(1, 9, 3, 2)
    inputs.x[:, 2] = torch.nan
    inputs.initial[:] = torch.nan
    reset = (torch.arange(9) == 4)[None]
    parts = SelectiveInputs(*(part.clone().requires_grad_() for part in inputs))
    y, last = selective_scan(parts, reset)
    delta, x, rates, write, read, initial = (part.clone() for part in inputs)
    later = SelectiveInputs(delta[:, 4:], x[:, 4:], rates, write[:, 4:], read[:, 4:], torch.zeros_like(initial))
    later = SelectiveInputs(*(part.clone().requires_grad_() for part in later))
    expected = selective_scan(later)
    assert_close((y[:, 4:], last), expected)
    (d_x,) = torch.autograd.grad(y[:, 4:].sum(), parts.x)
    (d_later,) = torch.autograd.grad(expected[0].sum(), later.x)
    assert_close(d_x[:, 4:], d_later)
    assert not d_x[:, :4].any()


def test_no_step_changes_nothing() -> None:
    inputs, reset = made(2, 0, 3, 2)
    y, last = selective_scan(inputs, reset)
    assert y.shape == (2, 0, 3) and torch.equal(last, inputs.initial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_little(dtype: torch.dtype) -> None:
    inputs, reset = made(2, 9, 3, 2)
    parts = SelectiveInputs(*(part.float().requires_grad_() for part in inputs))
    low = parts._replace(delta=parts.delta.to(dtype), write=parts.write.to(dtype))
    expected = torch.autograd.grad(selective_scan(parts, reset)[0].sum(), parts)
    with torch.autocast("cpu", dtype):
        y, last = selective_scan(low, reset)
    assert y.dtype == last.dtype == torch.float32
    for gradient, right in zip(torch.autograd.grad(y.sum(), parts), expected, strict=True):
        assert float((gradient - right).abs().max()) <= 0.1 * float(right.abs().max())


def test_gradients_of_gradients_are_right() -> None:
    inputs, reset = made(2, 5, 2, 2)
    parts = SelectiveInputs(*(part.requires_grad_() for part in inputs))
    assert torch.autograd.gradgradcheck(lambda *p: selective_scan(SelectiveInputs(*p), reset), tuple(parts))


def test_transforms_of_functions_work() -> None:
    inputs, reset = made(2, 6, 3, 2)

    def loss(x: Tensor) -> Tensor:
        return selective_scan(inputs._replace(x=x), reset)[0].square().sum()

    xs = torch.stack((inputs.x, 2 * inputs.x))
    by_autograd = []
    for x in xs.clone().requires_grad_().unbind(0):
        by_autograd.append(torch.autograd.grad(loss(x), x)[0])
    assert_close(vmap(grad(loss))(xs), torch.stack(by_autograd))


def test_a_compiled_scan_and_its_gradients_are_the_same() -> None:
    inputs, reset = made(2, 20, 3, 2)
    parts = SelectiveInputs(*(part.requires_grad_() for part in inputs))

    def result(scan: object) -> tuple[Tensor, ...]:
        y, last = scan(parts, reset)  # type: ignore[operator]
        return y, last, *torch.autograd.grad(y.square().sum() + last.sum(), parts)

    assert_close(result(torch.compile(selective_scan, backend="aot_eager", fullgraph=True)), result(selective_scan))
