"""Facts about the mLSTM alone: precision, extreme gates, long sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import MLSTMState, mlstm_sequence

every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_fast_backend = pytest.mark.parametrize("backend", cases.FAST_BACKENDS)


@every_backend
def test_first_step_follows_the_equations(backend: str) -> None:
    q, k, v = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -3.0]), torch.tensor([0.5, 4.0, -1.0])
    gate = torch.full((1, 1, 1), 0.25)
    here = (1, 1, 1, -1)
    hidden, state = mlstm_sequence(q.view(here), k.view(here), v.view(here), gate, gate, backend=backend)
    write = torch.exp(torch.tensor(0.25))
    scaled = write * k / 2**0.5
    assert_close(hidden[0, 0, 0], (q @ torch.outer(scaled, v)) / (q @ scaled).abs().clamp(min=1.0))
    assert_close(state.cell[0, 0] * state.stabilizer[0, 0].exp(), torch.outer(scaled, v))
    assert_close(state.normalizer[0, 0] * state.stabilizer[0, 0].exp(), scaled)


@every_backend
@pytest.mark.parametrize("T", (1, 40))
@given(lowest=st.floats(-200.0, -95.0))
def test_closed_input_gates_give_finite_gradients(backend: str, T: int, lowest: float) -> None:
    case = cases.make_case("mlstm", T=T, gate=3.0, empty_state=True)
    case.sequence[3].copy_(torch.linspace(lowest, -95.0, T)[:, None])
    result = cases.evaluate(cases.cast(case, torch.float32), backend)
    assert all(bool(x.isfinite().all()) for x in (result.hidden, *result.state, *result.sequence_gradient))


@every_backend
@pytest.mark.parametrize("T", (1, 40))
@pytest.mark.parametrize("input_gate", (-100.0, 0.0, 100.0))
def test_zero_queries_and_keys_give_finite_gradients(backend: str, T: int, input_gate: float) -> None:
    case = cases.cast(cases.make_case("mlstm", T=T, empty_state=True), torch.float32)
    case.sequence[0].zero_()
    case.sequence[1].zero_()
    case.sequence[3].fill_(input_gate)
    result = cases.evaluate(case, backend)
    assert all(bool(x.isfinite().all()) for x in (result.hidden, *result.state, *result.sequence_gradient))


@every_backend
def test_stabilizer_never_falls_below_zero(backend: str) -> None:
    case = cases.make_case("mlstm", T=50, gate=15.0)
    case.sequence[3].fill_(-50.0)
    _, state = cases.run(case, backend)
    assert bool((state.stabilizer >= 0).all())


@every_backend
def test_scale_of_the_state_does_not_matter(backend: str) -> None:
    case = cases.make_case("mlstm", T=40, gate=3.0, reset=0.0)
    assert isinstance(case.state, MLSTMState)
    cell, normalizer, stabilizer = case.state
    lifted = MLSTMState(cell * torch.e**-2, normalizer * torch.e**-2, stabilizer + 2.0)
    assert_close(cases.run(case._replace(state=lifted), backend)[0], cases.run(case, backend)[0])


@every_backend
def test_no_gradient_flows_through_the_stabilizer(backend: str) -> None:
    case = cases.leaves(cases.make_case("mlstm", T=4))
    _, state = cases.run(case, backend)
    assert not state.stabilizer.requires_grad


@every_fast_backend
@pytest.mark.parametrize("reset", (0.0, 0.002, 0.3))
def test_long_sequence_equals_the_reference(backend: str, reset: float) -> None:
    case = cases.make_case("mlstm", B=1, T=2048, H=1, K=3, V=2, gate=5.0, reset=reset)
    assert_close(cases.evaluate(case, backend), cases.evaluate(case, "reference"))


@every_fast_backend
@pytest.mark.parametrize("K", (32, 33, 64))
def test_wide_heads_equal_the_reference(backend: str, K: int) -> None:
    case = cases.make_case("mlstm", B=1, T=150, H=1, K=K, V=8, gate=5.0, reset=0.01)
    assert_close(cases.evaluate(case, backend), cases.evaluate(case, "reference"))


@every_fast_backend
@pytest.mark.parametrize("T", range(60, 70))
@pytest.mark.parametrize("start", (31, 32, 33, 34))
def test_resets_at_chunk_edges_equal_the_reference(backend: str, T: int, start: int) -> None:
    case = cases.make_case("mlstm", T=T, reset=0.0)
    case.reset[0, start : start + 2] = True
    assert_close(cases.evaluate(case, backend), cases.evaluate(case, "reference"))


@every_fast_backend
def test_float32_stays_precise_over_4096_steps(backend: str) -> None:
    case = cases.make_case("mlstm", B=1, T=4096, H=2, K=16, V=16, gate=1.0, reset=0.001)
    case.sequence[4].add_(3.0)
    hidden, gradient = cases.rms_errors(case, backend)
    assert hidden <= 2e-6
    assert gradient <= 5e-6


@every_fast_backend
def test_strided_arguments_give_the_same(backend: str) -> None:
    case = cases.make_case("mlstm", T=40)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.sequence)
    assert_close(cases.evaluate(case._replace(sequence=strided), backend), cases.evaluate(case, backend))


@every_fast_backend
def test_carried_state_owns_no_more_memory_than_it_shows(backend: str) -> None:
    _, state = cases.run(cases.make_case("mlstm", T=200), backend)
    assert all(leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size() for leaf in state)
