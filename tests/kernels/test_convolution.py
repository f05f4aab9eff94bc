"""Facts about the causal convolution."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import assert_close
from tests.kernels.cases import normal
from xlstm_rl.kernels import causal_conv


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor
    reset: Tensor


def make_arguments(B: int = 2, T: int = 9, D: int = 3, W: int = 4, reset: float = 0.2, seed: int = 0) -> Arguments:
    g = torch.Generator().manual_seed(seed)
    starts = torch.rand(B, T, generator=g) < reset
    return Arguments(normal(g, B, T, D), normal(g, D, W), normal(g, D), normal(g, B, W - 1, D), starts)


@st.composite
def arguments(draw: st.DrawFn, shortest: int = 0) -> Arguments:
    return make_arguments(
        B=draw(st.integers(1, 3)),
        T=draw(st.integers(shortest, 12)),
        D=draw(st.integers(1, 4)),
        W=draw(st.integers(1, 5)),
        reset=draw(st.sampled_from((0.0, 0.2, 0.7))),
        seed=draw(st.integers(0, 2**32)),
    )


def loop(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time."""
    outputs = []
    for t in range(x.shape[1]):
        state = state.masked_fill(reset[:, t, None, None], 0.0)
        inputs = torch.cat((state, x[:, t : t + 1]), 1)
        outputs.append(torch.einsum("bwd,dw->bd", inputs, weight) + bias)
        state = inputs[:, 1:]
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x), state


def with_gradients(run: Callable[..., tuple[Tensor, Tensor]], args: Arguments) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in args[:4]]
    y, window = run(*inputs, args.reset)
    g = torch.Generator().manual_seed(1)
    loss = (y * normal(g, *y.shape)).sum() + (window * normal(g, *window.shape)).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return y, window, *(torch.zeros_like(x) if d is None else d for d, x in zip(found, inputs, strict=True))


@given(args=arguments())
def test_convolution_equals_its_definition(args: Arguments) -> None:
    if args.x.shape[1] == 0:
        assert_close(causal_conv(*args), loop(*args))
    else:
        assert_close(with_gradients(causal_conv, args), with_gradients(loop, args))


@given(args=arguments())
def test_split_convolution_equals_the_whole(args: Arguments) -> None:
    middle = args.x.shape[1] // 2
    first, window = causal_conv(args.x[:, :middle], args.weight, args.bias, args.state, args.reset[:, :middle])
    second, window = causal_conv(args.x[:, middle:], args.weight, args.bias, window, args.reset[:, middle:])
    assert_close((torch.cat((first, second), 1), window), causal_conv(*args))


@given(args=arguments(shortest=1))
def test_no_gradient_crosses_a_reset(args: Arguments) -> None:
    middle = args.x.shape[1] // 2
    args.reset[:, middle] = True
    x, state = args.x.requires_grad_(), args.state.requires_grad_()
    y, window = causal_conv(x, args.weight, args.bias, state, args.reset)
    loss = y[:, middle:].square().sum() + window.square().sum()
    before, initial = torch.autograd.grad(loss, (x, state), allow_unused=True, materialize_grads=True)
    assert int(before[:, :middle].count_nonzero()) == 0
    assert int(initial.count_nonzero()) == 0


def test_last_tap_is_the_current_input() -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    y, window = causal_conv(x, torch.tensor([[10.0, 1.0]]), torch.zeros(1))
    assert_close(y.flatten(), torch.tensor([1.0, 12.0, 23.0]))
    assert_close(window.flatten(), torch.tensor([3.0]))


@pytest.mark.parametrize("T", (1, 5))
def test_no_bias_is_a_bias_of_zero(T: int) -> None:
    x, weight, bias, state, reset = make_arguments(T=T)
    expected = causal_conv(x, weight, torch.zeros_like(bias), state, reset)
    assert_close(causal_conv(x, weight, None, state, reset), expected)


@pytest.mark.parametrize("T", (1, 5))
def test_no_state_is_a_window_of_zeros(T: int) -> None:
    x, weight, bias, state, reset = make_arguments(T=T)
    expected = causal_conv(x, weight, bias, torch.zeros_like(state), reset)
    assert_close(causal_conv(x, weight, bias, None, reset), expected)


@pytest.mark.parametrize("name", ("x", "weight", "bias", "state", "reset"))
def test_wrong_shape_is_named(name: str) -> None:
    args = make_arguments()
    wrong = args._replace(**{name: getattr(args, name)[..., :1, None]})
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        causal_conv(*wrong)


def test_reset_of_another_kind_is_refused() -> None:
    args = make_arguments()
    with pytest.raises(TypeError, match=r"reset has dtype torch.float32; allowed is torch.bool"):
        causal_conv(*args[:4], args.reset.float())
