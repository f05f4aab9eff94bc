"""The compiled mixer of an mLSTM block equals the same layers in torch operations, gradients and all."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import assert_close
from tests.memory.test_block_step import CONFIGS, perturbed, random
from xlstm_rl.kernels import cpp_extension
from xlstm_rl.kernels.cpp_mixer import mlstm_mixer
from xlstm_rl.memory import MemoryCore, fast, map_leaves, pack

pytestmark = pytest.mark.skipif(cpp_extension.extension().module is None, reason="the compiled kernels are not built")

MIXERS = {label: CONFIGS[label] for label in CONFIGS if label not in ("memory mixing, biases", "without FFN")} | {
    "conv longer than a tile's padding": {"conv_kernel": 20},
    "conv longer than a tile": {"conv_kernel": 80},
    "soft cap and sigmoid, exponential forget gate": {
        "gate_soft_cap": 2.0,
        "input_activation": "sigmoid",
        "forget_activation": "exp",
    },
    "widths off the vector width": {"hidden_size": 10, "proj_factor": 1.0, "round_to": 1, "qkv_block_size": 1},
}


def in_layers(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call with the compiled mixer switched off; the cell stays compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "can_mix", lambda x: False)
        return call(*arguments)


def outputs_and_gradients(core: MemoryCore, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Any, ...]:
    """Everything a block computes: outputs, final state, and gradients of a random projection of both."""
    x = x.clone().requires_grad_()
    state = map_leaves(lambda leaf: leaf.clone().requires_grad_(), state)
    y, final = core(x, state, reset)
    flat = pack(final)
    loss = (y * random(*y.shape, dtype=y.dtype, seed=3)).sum() + (flat * random(*flat.shape, seed=4).to(y)).sum()
    sources = [x, *(leaf for block in state for leaf in (*block.cell[:2], block.window)), *core.parameters()]
    return y, flat, torch.autograd.grad(loss, sources)


@pytest.mark.parametrize("label", MIXERS)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 2), (2, 37), (2, 131)])
def test_compiled_mixer_equals_the_layers(label: str, B: int, T: int) -> None:
    core = perturbed("m", **MIXERS[label])
    with torch.no_grad():
        state = core(random(B, 5, 5), core.initial_state(B))[1]
    some = random(B, T, seed=5) > 1
    for reset in (None, some, torch.ones(B, T, dtype=torch.bool)):
        arguments = (core, random(B, T, 5, seed=2), state, reset)
        assert_close(outputs_and_gradients(*arguments), in_layers(outputs_and_gradients, *arguments))


@given(T=st.integers(1, 70), seed=st.integers(0, 99), starts=st.floats(0, 0.5))
def test_single_precision_agrees_with_double(T: int, seed: int, starts: float) -> None:
    double = perturbed("m")
    single = copy.deepcopy(double).float()
    reset = torch.rand(2, T, generator=torch.Generator().manual_seed(seed)) < starts
    x = random(2, T, 5, seed=seed)
    with torch.no_grad():
        y, _ = single(x.float(), single.initial_state(2), reset)
        expected, _ = double(x, double.initial_state(2), reset)
    assert_close(y, expected)


def test_gradients_by_finite_differences() -> None:
    core = perturbed("m", hidden_size=8, gate_soft_cap=4.0)
    reset = torch.tensor([[False, False, True, False, False]])
    state = core.initial_state(1)
    assert torch.autograd.gradcheck(lambda x: core(x, state, reset)[0], (random(1, 5, 5).requires_grad_(),))


def test_the_mixer_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return mlstm_mixer(*arguments)

    monkeypatch.setattr(fast, "mlstm_mixer", counted)
    core: Any = perturbed("m", dropout=0.5)
    core(random(2, 4, 5), core.initial_state(2), torch.zeros(2, 8, dtype=torch.bool)[:, ::2])
    assert len(calls) == 1
    core.blocks[0].skip = torch.nn.Parameter(random(48, 2)[:, 0])  # rows apart: cannot be read in order
    y, _ = core.eval()(random(2, 4, 5), core.initial_state(2))
    assert_close(y, in_layers(core, random(2, 4, 5), core.initial_state(2))[0])


def test_forgotten_inputs_may_hold_anything() -> None:
    core = perturbed("m")
    state = map_leaves(lambda leaf: torch.full_like(leaf, torch.nan), core.initial_state(2))
    reset = torch.tensor([[True, False, False], [True, True, False]])
    y, final = core(random(2, 3, 5), state, reset)
    assert_close((y, pack(final)), (core(random(2, 3, 5), core.initial_state(2), reset)[0], pack(final)))


def test_threads_do_not_change_a_bit() -> None:
    core: Any = perturbed("m")
    block = core.blocks[0]
    x, reset = random(5, 70, 2 * 48), random(5, 70, seed=6) > 1.5

    def gradients() -> tuple[Tensor, ...]:
        source = x.clone().requires_grad_()
        y, _ = block.compiled.mix(block, source, block.initial_state(5), reset)
        weights = [block.conv.weight, block.query_key.weight, block.gates.weight, block.head_norm.weight, block.skip]
        return torch.autograd.grad((y * y).sum(), [source, *weights])

    expected = gradients()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, gradients(), expected))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_state_that_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    core = perturbed("m")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        core(random(2, 3, 5), perturbed("m", dtype, hidden_size=32).initial_state(2))


def test_second_derivatives_are_refused() -> None:
    core = perturbed("m")
    x = random(1, 4, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(core(x, core.initial_state(1))[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_builds_for_lesser_processors_pass_as_well(capability: str) -> None:
    files = [Path(__file__), Path(__file__).with_name("test_block_step.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "equals", *map(str, files)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, cwd=files[0].parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
