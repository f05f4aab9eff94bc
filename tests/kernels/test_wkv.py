"""The time mixing of RWKV-4 over a sequence equals its equation, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import assert_close
from xlstm_rl.kernels.wkv import WKVState, wkv_sequence

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, WKVState]


def made(B: int, T: int, D: int, seed: int = 0, starts: float = 0.2, empty: bool = False) -> tuple[Arguments, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = WKVState(random(B, D), random(B, D).abs() + 1, random(B, D))
    if empty:
        state = WKVState(*(torch.zeros_like(part) for part in state))
    arguments = (2 * random(B, T, D), random(B, T, D), random(D).exp(), random(D), state)
    return arguments, torch.rand(B, T, generator=generator) < starts


def by_its_equation(arguments: Arguments, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and both last sums, number by number."""
    k, v, decay, bonus, state = arguments
    B, T, D = k.shape
    y, sums = torch.zeros_like(v), torch.zeros(2, B, D, dtype=torch.float64)
    for b in range(B):
        for d in range(D):
            scale = math.exp(state.stabilizer[b, d])
            above, below = (float(part[b, d]) * scale for part in state[:2])
            for t in range(T):
                above, below = (0.0, 0.0) if reset is not None and reset[b, t] else (above, below)
                now = math.exp(bonus[d] + k[b, t, d])
                y[b, t, d] = (above + now * v[b, t, d]) / (below + now)
                weight, kept = math.exp(k[b, t, d]), math.exp(-decay[d])
                above, below = kept * above + weight * float(v[b, t, d]), kept * below + weight
            sums[:, b, d] = torch.tensor([above, below], dtype=torch.float64)
    return y, sums[0], sums[1]


@given(
    T=st.integers(1, 20), starts=st.sampled_from([None, 0.0, 0.1, 1.0]), empty=st.booleans(), seed=st.integers(0, 99)
)
def test_outputs_and_states_follow_the_equation(T: int, starts: float | None, empty: bool, seed: int) -> None:
    arguments, reset = made(2, T, 3, seed, starts or 0.0, empty)
    y, last = wkv_sequence(*arguments, None if starts is None else reset)
    scale = last.stabilizer.exp()
    expected = by_its_equation(arguments, None if starts is None else reset)
    assert_close((y, last.numerator * scale, last.denominator * scale), expected)


@pytest.mark.parametrize("empty", [False, True])
def test_gradients_are_those_of_differences(empty: bool) -> None:
    (k, v, decay, bonus, state), reset = made(2, 6, 2, empty=empty)

    def outputs(
        k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, above: Tensor, below: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, last = wkv_sequence(k, v, decay, bonus, WKVState(above, below, state.stabilizer), reset)
        # differences move the scale, which gradients leave where it is: the ratio has none
        return y, last.numerator / last.denominator

    # of an empty state a difference is none
    sums = [part.requires_grad_() if not empty else part for part in state[:2]]
    assert torch.autograd.gradcheck(outputs, (*(part.requires_grad_() for part in (k, v, decay, bonus)), *sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_of_any_size_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    k = torch.tensor([-3e4, 3e4, 3e4, -3e4, -100.0], dtype=dtype)[None, :, None]
    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=dtype)[None, :, None]
    empty = WKVState(*(torch.zeros(1, 1, dtype=dtype) for _ in range(3)))
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    y, last = wkv_sequence(k, v, one, zero, empty)
    # the second key outweighs the first; the third is as large, and the second has not decayed then, but later
    later = (2 / math.e + 4) / (1 / math.e + 1)
    assert_close(y[0, :, 0], torch.tensor([1.0, 2.0, 3.0, later, later], dtype=dtype))
    assert all(part.isfinite().all() for part in last)
    y, _ = wkv_sequence(k[:, :1], v[:, :1], one, zero, empty)
    assert y.item() == 1.0


def test_steps_in_half_precision_are_computed_in_that_of_the_state() -> None:
    (k, v, decay, bonus, state), reset = made(2, 9, 3)
    state = WKVState(*(part.float() for part in state))
    y, last = wkv_sequence(k.bfloat16(), v.bfloat16(), decay.float(), bonus.float(), state, reset)
    assert {y.dtype, *(part.dtype for part in last)} == {torch.float32}
