"""Selective state spaces: the parallel scan and its backward pass equal the recurrence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from tests.conftest import assert_close
from xlstm_rl.kernels import selective_scan as module
from xlstm_rl.kernels.selective_scan import (
    SelectiveInputs,
    diagonal_recurrence,
    scan_in_place,
    selective_recurrence,
    selective_scan,
)


@pytest.fixture(params=["one chunk", "chunks"], autouse=True)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to go through a sequence, whatever its size."""
    monkeypatch.setattr(module, "_ENOUGH_FOR_A_CPU", 0 if request.param == "one chunk" else 10**9)


def made(B: int, T: int, I: int, N: int, seed: int = 0, starts: float = 0.2) -> tuple[SelectiveInputs, Tensor]:  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = SelectiveInputs(
        random(B, T, I).abs(), random(B, T, I), random(N, I).abs(), random(B, T, N), random(B, T, N), random(B, N, I)
    )
    return inputs, torch.rand(B, T, generator=generator) < starts


@given(T=st.integers(1, 50), starts=st.floats(0, 1), seed=st.integers(0, 99), backwards=st.booleans())
def test_scan_equals_the_recurrence(T: int, starts: float, seed: int, backwards: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    decay, terms = torch.rand(2, 3, T, 2, 4, generator=generator, dtype=torch.float64).unbind(0)
    initial = torch.rand(3, 2, 4, generator=generator, dtype=torch.float64)
    reset = torch.rand(3, T, generator=generator) < starts
    parts = (decay, terms, reset)
    if backwards:
        expected, _ = diagonal_recurrence(decay.flip(1), terms.flip(1), initial, reset.flip(1))
        expected = expected.flip(1)
    else:
        expected, _ = diagonal_recurrence(decay, terms, initial, reset)
    written = parts[1].clone()
    scan_in_place(decay, written, initial, reset, backwards=backwards)
    assert_close(written, expected)


def test_tiny_decays_do_not_underflow_into_wrong_states() -> None:
    terms = torch.ones(1, 40, 1)
    scan_in_place(torch.full((1, 40, 1), 1e-30), terms, torch.ones(1, 1), None)
    assert_close(terms, torch.ones(1, 40, 1))


@given(T=st.integers(1, 40), starts=st.sampled_from([None, 0.0, 0.1, 1.0]), seed=st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_the_recurrence(T: int, starts: float | None, seed: int) -> None:
    inputs, reset = made(3, T, 4, 2, seed, starts or 0.0)
    inputs = SelectiveInputs(*(part.requires_grad_() for part in inputs))

    def result(form: object) -> tuple[Tensor, ...]:
        y, last = form(inputs, None if starts is None else reset)  # type: ignore[operator]
        loss = (y * torch.arange(T)[:, None]).sum() + last.square().sum()
        return y, last, *torch.autograd.grad(loss, inputs)

    assert_close(result(selective_scan), result(selective_recurrence))


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


def test_gradient_by_some_of_the_inputs_is_that_of_the_recurrence() -> None:
    inputs, reset = made(2, 7, 3, 2)
    inputs.x.requires_grad_()
    by_scan, by_recurrence = (
        torch.autograd.grad(form(inputs, reset)[0].sum(), inputs.x) for form in (selective_scan, selective_recurrence)
    )
    assert_close(by_scan, by_recurrence)


def test_gradient_with_a_graph_is_the_same_where_inputs_are_made_of_each_other() -> None:
    inputs, reset = made(2, 7, 3, 3)
    z = inputs.x.requires_grad_()

    def gradient(create_graph: bool) -> Tensor:
        h = 2 * z
        y, _ = selective_scan(SelectiveInputs(h.abs(), h, inputs.rates, h, h, inputs.initial), reset)
        return torch.autograd.grad(y.sum(), z, create_graph=create_graph)[0].detach()

    assert_close(gradient(True), gradient(False))


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
