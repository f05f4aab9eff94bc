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


def test_gradients_without_a_need_are_not_asked_for() -> None:
    inputs, reset = made(2, 7, 3, 2)
    inputs.x.requires_grad_()
    y, _ = selective_scan(inputs, reset)
    (d_x,) = torch.autograd.grad(y.sum(), inputs.x)
    assert d_x.abs().sum() > 0


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


def test_a_compiled_scan_gives_the_same() -> None:
    inputs, reset = made(2, 20, 3, 2)
    compiled = torch.compile(selective_scan, backend="aot_eager")
    assert_close(compiled(inputs, reset), selective_scan(inputs, reset))
