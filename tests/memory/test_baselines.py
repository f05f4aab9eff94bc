"""LSTM and GRU: how they start, and the two ways in which they run the segments of a batch."""

from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from tests.conftest import assert_close
from xlstm_rl.memory import RNNState, make_memory


def biases(name: str, **settings: Any) -> torch.Tensor:
    """Biases of the input [layers, gates, units]."""
    torch.manual_seed(0)
    core = make_memory(name, 3, hidden_size=8, num_layers=2, **settings)
    gates = 4 if name == "lstm" else 3
    return torch.stack([core.get_parameter(f"rnn.bias_ih_l{layer}").detach().view(gates, 8) for layer in range(2)])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_forget_bias_moves_the_gate_that_keeps_the_memory_alone(name: str) -> None:
    moved = biases(name, forget_bias=3.0) - biases(name)
    expected = torch.zeros_like(moved)
    expected[:, 1] = 3.0
    assert torch.allclose(moved, expected)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_forget_bias_holds_what_was_seen(name: str) -> None:
    @torch.no_grad()
    def left(forget_bias: float) -> float:
        """How much of the difference of two memories is left after 20 steps of the same input."""
        torch.manual_seed(0)
        core = make_memory(name, 3, hidden_size=32, forget_bias=forget_bias)
        seen = [core(torch.randn(1, 1, 3), core.initial_state(1))[1] for _ in range(2)]
        x = torch.zeros(1, 20, 3)
        a, b = (core(x, state)[0][0, -1] for state in seen)
        return float((a - b).norm())

    assert left(3.0) > 20 * left(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget_bias": float("nan")}, "forget_bias=nan must be a finite number"),
        ({"forget_bias": 1.0, "bias": False}, "forget_bias=1.0 needs biases: set bias=True"),
    ],
)
def test_forget_bias_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_memory("lstm", 3, **settings)


@pytest.mark.parametrize("num_layers", (1, 3))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("ends", (0, 1, 6, 30, 60))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_padded_segments_equal_packed_ones(num_layers: int, bias: bool, ends: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    core: Any = make_memory("lstm", 3, hidden_size=8, num_layers=num_layers, bias=bias).to(dtype)
    x = torch.randn(3, 20, 3, dtype=dtype)
    reset = (torch.randperm(60) < ends).view(3, 20)
    state = core(torch.randn(3, 4, 3, dtype=dtype), core.initial_state(3))[1]

    def outcome() -> tuple[Any, ...]:
        inputs = [part.detach().clone().requires_grad_() for part in (x, *state)]
        y, final = core(inputs[0], RNNState(*inputs[1:]), reset)
        loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in (y, *final))
        return y, final, torch.autograd.grad(loss, [*inputs, *core.parameters()])

    padded = outcome()
    called = []
    # a call of the layer is one of all segments as one packed sequence
    core.rnn.register_forward_hook(lambda module, inputs, output: called.append(type(inputs[0])))
    packed = outcome()
    assert called == [PackedSequence]
    assert_close(padded, packed)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_what_is_added_to_the_layer_of_torch_acts_everywhere(name: str) -> None:
    core: Any = make_memory(name, 3, hidden_size=8)
    x, reset = torch.randn(2, 9, 3), torch.arange(18).view(2, 9) % 4 == 1
    plain, _ = core(x, core.initial_state(2), reset)
    parametrize.register_parametrization(core.rnn, "weight_hh_l0", torch.nn.Tanh())
    with torch.no_grad():
        core.rnn.parametrizations.weight_hh_l0.original.mul_(5.0)
    y, _ = core(x, core.initial_state(2), reset)
    assert not torch.allclose(y, plain)
    steps, state = [], core.initial_state(2)
    for t in range(9):
        step, state = core.step(x[:, t], state, reset[:, t])
        steps.append(step)
    assert_close(torch.stack(steps, 1), y)
