"""The parallel scan of a diagonal recurrence equals the recurrence."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import assert_close
from xlstm_rl.memory.state_space import diagonal_scan


def recurrence(decay: Tensor, added: Tensor, initial: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    h, states = initial, []
    for t in range(decay.shape[1]):
        h = torch.where(reset[:, t, None], torch.zeros_like(h), h)
        h = decay[:, t] * h + added[:, t]
        states.append(h)
    return torch.stack(states, 1), h


@given(T=st.integers(1, 50), starts=st.floats(0, 1), seed=st.integers(0, 99))
def test_scan_equals_the_recurrence_and_its_gradients(T: int, starts: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decay, added = torch.rand(2, 3, T, 4, generator=generator, dtype=torch.float64).unbind(0)
    initial = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    reset = torch.rand(3, T, generator=generator) < starts
    inputs = [x.requires_grad_() for x in (decay, added, initial)]

    def result(scan: object) -> tuple[Tensor, ...]:
        hidden, last = scan(*inputs, reset)  # type: ignore[operator]
        loss = (hidden * torch.arange(T)[:, None]).sum() + last.square().sum()
        return hidden, last, *torch.autograd.grad(loss, inputs)

    assert_close(result(diagonal_scan), result(recurrence))


def test_tiny_decays_do_not_underflow_into_wrong_states() -> None:
    decay, added = torch.full((1, 40, 1), 1e-30), torch.ones(1, 40, 1)
    hidden, _ = diagonal_scan(decay, added, torch.ones(1, 1))
    assert_close(hidden, torch.ones(1, 40, 1))


def test_what_was_before_an_episode_start_may_be_anything() -> None:
    decay, added, initial = torch.full((1, 9, 1), 0.5), torch.ones(1, 9, 1), torch.full((1, 1), torch.nan)
    added[:, 2] = torch.nan
    reset = (torch.arange(9) == 4)[None]
    hidden, _ = diagonal_scan(decay, added, initial, reset)
    expected, _ = diagonal_scan(decay[:, 4:], torch.ones(1, 5, 1), torch.zeros(1, 1))
    assert_close(hidden[:, 4:], expected)
