"""A core called in a way that does not fit says what is wrong; without a state it starts from the empty one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xlstm_rl.memory import make_memory, memory_names
from xlstm_rl.memory.core import MemoryCore
from xlstm_rl.memory.state import pack

CORES = [("xlstm", {"blocks": letter}) for letter in ("m", "s", "a", "d", "ms")] + [
    (name, {}) for name in ("frames", "gru", "lstm", "none", "rwkv", "ssm", "transformer")
]
X, RESET = torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.bool)


def core_of(name: str, settings: dict[str, Any]) -> MemoryCore:
    return make_memory(name, 5, hidden_size=16, **settings)


@pytest.mark.parametrize(("name", "settings"), CORES)
def test_without_a_state_a_core_starts_from_the_empty_one(name: str, settings: dict[str, Any]) -> None:
    core, x = core_of(name, settings).eval(), torch.randn(3, 4, 5)
    expected, state = core(x, core.initial_state(3), RESET)
    for y, final in (core(x), core(x, None), core(x, reset=RESET)):
        assert torch.equal(y, expected) and torch.equal(pack(final), pack(state))
    expected, state = core.step(x[:, 0], core.initial_state(3))
    for y, final in (core.step(x[:, 0]), core.step(x[:, 0], None)):
        assert torch.equal(y, expected) and torch.equal(pack(final), pack(state))


Call = Callable[[MemoryCore, Any], object]
WRONG: dict[str, tuple[Call, str]] = {
    "a step as a sequence": (
        lambda core, state: core(X[:, 0], state),
        r"x has shape \[3, 5\].*core.step takes \[B, 5\]",
    ),
    "a sequence as a step": (lambda core, state: core.step(X, state), r"x has shape \[3, 4, 5\].*takes \[B, T, 5\]"),
    "features": (lambda core, state: core(X[..., :4], state), r"x has shape \[3, 4, 4\].*input_size=5"),
    "features of a step": (lambda core, state: core.step(X[:, 0, :4], state), r"x has shape \[3, 4\].*input_size=5"),
    "rows": (lambda core, state: core(X[:2], state), "the state .* and that of 2 rows"),
    "one row for all": (lambda core, _: core(X, core.initial_state(1)), "the state .* and that of 3 rows"),
    "rows of a step": (lambda core, state: core.step(X[:2, 0], state), "the state .* and that of 2 rows"),
    "one row for a step": (lambda core, _: core.step(X[:, 0], core.initial_state(1)), "the state .* of 3 rows"),
    "packed": (lambda core, state: core(X, pack(state)), "the state is a Tensor .*unpack"),
    "packed for a step": (lambda core, state: core.step(X[:, 0], pack(state)), "the state is a Tensor .*unpack"),
    "reset": (lambda core, state: core(X, state, RESET[:, 0]), r"reset has shape \(3,\); allowed is \(3, 4\)"),
    "reset of a step": (lambda core, state: core.step(X[:, 0], state, RESET), r"reset has shape .*allowed is \(3,\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("name", "settings"), CORES)
def test_a_call_that_does_not_fit_is_named(name: str, settings: dict[str, Any], wrong: str) -> None:
    call, message = WRONG[wrong]
    core = core_of(name, settings)
    if name == "none" and "packed" in wrong:
        pytest.skip("it has no state that could be another")
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(core, core.initial_state(3))


@pytest.mark.parametrize(("name", "settings"), CORES)
def test_numbers_in_place_of_flags_are_refused(name: str, settings: dict[str, Any]) -> None:
    core = core_of(name, settings)
    with pytest.raises(TypeError, match=r"reset has dtype torch.float32; allowed is torch.bool"):
        core(X, None, RESET.float())


def test_all_memories_are_tried() -> None:
    assert {name for name, _ in CORES} <= set(memory_names())
