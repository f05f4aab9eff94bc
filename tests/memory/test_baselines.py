"""What LSTM and GRU are initialised to."""

from typing import Any

import pytest
import torch

from xlstm_rl.memory import make_memory


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
