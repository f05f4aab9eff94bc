"""Numbers that are not finite spoil their episode from there on: no step before, no later episode, no other row."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import causal_conv
from xlstm_rl.kernels.spoilt import spoilt_from

every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)
every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_value = pytest.mark.parametrize("value", (math.nan, math.inf, 1e300))
NAMES = {"mlstm": ("q", "k", "v", "input_gate", "forget_gate"), "slstm": ("gates",)}
INPUTS = [(operation, at) for operation, names in NAMES.items() for at in range(len(names))]
every_input = pytest.mark.parametrize(
    ("operation", "at"), INPUTS, ids=[f"{operation}-{NAMES[operation][at]}" for operation, at in INPUTS]
)
# Two chunks and a part of a third; the episode starts lie in the chunk of the spoilt step and in the next ones.
T, SPOILT = 75, 12


def spoil(case: cases.Case, at: int, value: float) -> cases.Case:
    """The case with one number of row 0 replaced."""
    sequence = [x.clone() for x in case.sequence]
    sequence[at][0, SPOILT].view(-1)[-1] = value
    return case._replace(sequence=tuple(sequence))


def with_starts(operation: str, again: int, seed: int = 0) -> cases.Case:
    """A case whose row 0 has episode starts at `again` alone."""
    case = cases.make_case(operation, T=T, H=2, K=4, V=4, gate=3.0, seed=seed)
    case.reset[0] = False
    case.reset[0, again] = True
    return case


def clean_places(again: int) -> Tensor:
    """Steps [B, T] that the spoilt one does not reach."""
    clean = torch.ones(2, T, dtype=torch.bool)
    clean[0, SPOILT:again] = False
    return clean


@every_input
@every_backend
@every_value
@pytest.mark.parametrize("again", (SPOILT + 1, 40))
def test_a_spoilt_step_reaches_no_other_episode_and_no_step_before(
    operation: str, at: int, backend: str, value: float, again: int
) -> None:
    case = with_starts(operation, again)
    hidden, state = cases.run(spoil(case, at, value), backend)
    expected, expected_state = cases.run(case, backend)
    clean = clean_places(again)
    assert_close(hidden[clean], expected[clean])
    assert_close(state, expected_state)


@every_input
@every_backend
@pytest.mark.parametrize("again", (SPOILT + 1, 40))
def test_gradients_by_what_is_not_spoilt_stay_as_they_were(operation: str, at: int, backend: str, again: int) -> None:
    case = with_starts(operation, again)
    clean = clean_places(again)

    def gradients(case: cases.Case) -> tuple[Tensor, ...]:
        case = cases.leaves(case)
        hidden, state = cases.run(case, backend)
        chosen = torch.where(clean[..., None, None], hidden, 0.0)
        return torch.autograd.grad(
            (chosen * torch.linspace(-1, 1, chosen.numel()).view_as(chosen)).sum() + sum(leaf.sum() for leaf in state),
            (*case.sequence, *case.weights, *state_leaves(case)),
        )

    for found, expected in zip(gradients(spoil(case, at, math.nan)), gradients(case), strict=True):
        if found.shape[:2] == clean.shape:
            found, expected = found[clean], expected[clean]
        elif len(found) == 4:  # recurrent weights, which the steps that are left out act on as well
            assert bool(found.isfinite().all())
            continue
        assert_close(found, expected)


def state_leaves(case: cases.Case) -> tuple[Tensor, ...]:
    return cases.carrying_gradient(case.state)


@every_operation
@every_backend
@every_value
@pytest.mark.parametrize("again", (0, 7, 40))
def test_a_spoilt_state_ends_at_an_episode_start(operation: str, backend: str, value: float, again: int) -> None:
    case = with_starts(operation, again)
    expected, expected_state = cases.run(case, backend)
    for name in case.state._fields:
        leaf = getattr(case.state, name).clone()
        leaf[0].view(-1)[-1] = value
        hidden, state = cases.run(case._replace(state=case.state._replace(**{name: leaf})), backend)
        assert_close(hidden[0, again:], expected[0, again:])
        assert_close(hidden[1], expected[1])
        assert_close(state, expected_state)


@every_input
@every_backend
def test_what_is_spoilt_is_told(operation: str, at: int, backend: str) -> None:
    case = with_starts(operation, 40)
    hidden, state = cases.run(spoil(case, at, math.nan), backend)
    in_steps, carried = [], case.state
    for t in range(T):
        step = cases.steps(spoil(case, at, math.nan), slice(t, t + 1))._replace(state=carried)
        h, carried = cases.run(step, backend)
        in_steps.append(h)
    # of the step itself some heads or units may be spared
    there = torch.cat(in_steps, 1).isnan().any(-1)
    assert torch.equal(hidden.isnan().any(-1), there)
    assert bool(there.any())


@every_operation
@every_backend
def test_gates_that_are_shut_for_good_are_numbers_like_any_others(operation: str, backend: str) -> None:
    """A forget gate of minus infinity empties a memory that holds something, and is no error."""
    case = with_starts(operation, 40)
    sequence = [x.clone() for x in case.sequence]
    (sequence[4] if operation == "mlstm" else sequence[0][:, :, 1])[0, SPOILT] = -math.inf
    case = case._replace(sequence=tuple(sequence))
    assert_close(cases.run(case, backend), cases.run(case, "reference"))


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("again", (4, 5, 9))
def test_a_convolution_sees_no_spoilt_input_of_another_episode(value: float, again: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = cases.normal(generator, 2, 10, 3), cases.normal(generator, 3, 4)
    spoilt = x.clone()
    spoilt[0, 3, 1] = value
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[0, again] = True
    clean = torch.ones(2, 10, dtype=torch.bool)
    clean[0, 3:again] = False

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.requires_grad_()
        y, window = causal_conv(x, weight, None, None, reset)
        # as in the layers that follow, zero times what is not finite comes back
        (gradient,) = torch.autograd.grad((y * 0.5)[clean].sum() + (y * y * ~clean[..., None]).sum() * 0.0, x)
        return y[clean], window, gradient[clean]

    assert_close(run(spoilt), run(x))


def test_steps_after_a_bad_one_are_spoilt_until_the_next_start() -> None:
    bad = torch.tensor([[0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    reset = torch.tensor([[0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert spoilt_from(bad, reset).int().tolist() == [[0, 1, 1, 0, 0, 1], [0] * 6]
    assert spoilt_from(bad, None).int().tolist() == [[0, 1, 1, 1, 1, 1], [0] * 6]


@pytest.mark.skipif("cpp" not in cases.BACKENDS, reason="the compiled kernels are not built")
@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_builds_for_lesser_processors_pass_as_well(capability: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cpp and not lesser", __file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
