"""Gradient spikes are cut to the usual size; lasting change gets through."""

import pytest
import torch
from torch import Tensor

from xlstm_rl.agents.losses import clip_gradients


def parameter(gradient: float) -> Tensor:
    tensor = torch.zeros(4, requires_grad=True)
    tensor.grad = torch.full((4,), gradient / 2)  # norm = gradient
    return tensor


def norm_after(gradient: float, running: float | None, factor: float | None = 5.0) -> tuple[float, float]:
    tensor = parameter(gradient)
    running = clip_gradients([tensor], max_norm=1.0, spike_factor=factor, running_norm=running)
    assert tensor.grad is not None
    return float(tensor.grad.norm()), running


def test_first_gradient_knows_the_absolute_bound_only() -> None:
    assert norm_after(0.8, None) == pytest.approx((0.8, 0.8), rel=1e-4)
    assert norm_after(3.0, None) == pytest.approx((1.0, 1.0), rel=1e-4)


def test_gradient_of_zero_does_not_bound_those_after_it() -> None:
    norm, running = norm_after(0.0, None)
    assert norm == running == 0.0
    assert norm_after(0.8, running) == pytest.approx((0.8, 0.8), rel=1e-4)


def test_spike_is_cut_to_a_multiple_of_the_usual_norm() -> None:
    norm, running = norm_after(0.5, 0.001)
    assert norm == pytest.approx(0.005, rel=1e-3)
    assert running == pytest.approx(0.00104, rel=1e-3)


def test_without_a_factor_only_the_absolute_bound_holds() -> None:
    assert norm_after(0.5, 0.001, factor=None)[0] == pytest.approx(0.5)


def test_usual_gradients_pass_unchanged() -> None:
    assert norm_after(0.012, 0.01) == pytest.approx((0.012, 0.01002), rel=1e-4)


def test_gradients_that_stay_large_get_through_in_the_end() -> None:
    running: float | None = 0.001
    for _ in range(200):
        norm, running = norm_after(0.5, running)
    assert norm == pytest.approx(0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(FloatingPointError, match="gradient norm is (nan|inf)"):
        norm_after(value, 0.1)
