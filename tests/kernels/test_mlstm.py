"""Facts about the mLSTM alone: precision, extreme gates, long sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import ForgetActivation, MLSTMState, mlstm_sequence

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


@pytest.mark.parametrize("backend", cases.FAST_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("size", (2.0**10, 2.0**15, 2.0**30, 2.0**60, 2.0**100))
@pytest.mark.parametrize("forget_activation", ("sigmoid", "exp"))
def test_gates_that_are_large_and_cancel_equal_the_reference(
    backend: str, dtype: torch.dtype, size: float, forget_activation: ForgetActivation
) -> None:
    T = 40
    ones = torch.ones(1, T, 1, 1, dtype=dtype)
    value = torch.arange(1.0, T + 1, dtype=dtype).view(1, T, 1, 1)
    gates = torch.stack((torch.arange(T) % 3 - 1.0, -(torch.arange(T) % 4 / 2.0)), -1).to(dtype)[None, :, None]
    # what was written with a huge gate is forgotten by one as huge, early, at a chunk's edge and in the next one
    for t in (0, 30, 35):
        gates[0, t, 0, 0], gates[0, t + 1, 0, 1] = size, -size
    arguments = (ones, ones, value, gates[..., 0], gates[..., 1])
    hidden, state = mlstm_sequence(*arguments, forget_activation=forget_activation, backend=backend)
    expected, expected_state = mlstm_sequence(*arguments, forget_activation=forget_activation, backend="reference")
    assert_close(hidden, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("backend", cases.FAST_BACKENDS)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("seed", range(10))
def test_gates_of_every_size_equal_the_reference(backend: str, operation: str, seed: int) -> None:
    case = cases.make_case(operation, T=50, K=3, V=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sequence = list(case.sequence)
    for at in (3, 4) if operation == "mlstm" else (0,):
        exponent = cases.uniform(generator, -2, 30, *sequence[at].shape)
        sequence[at] = 10**exponent * sequence[at].sign()
    case = case._replace(sequence=tuple(sequence))
    assert_close(cases.run(case, backend), cases.run(case, "reference"))


@pytest.mark.parametrize("backend", cases.FAST_BACKENDS)
@pytest.mark.parametrize("forget_activation", ("sigmoid", "exp"))
@pytest.mark.parametrize("T", (17, 70))
def test_single_precision_rounds_gates_that_cancel_at_the_steps_of_the_reference(
    backend: str, forget_activation: ForgetActivation, T: int
) -> None:
    case = cases.make_case("mlstm", B=64, T=T, H=1, reset=0.03, forget_activation=forget_activation)
    case = cases.cast(case, torch.float32)
    generator = torch.Generator().manual_seed(T)
    shape = case.sequence[3].shape
    # few values beyond the size where neighbouring numbers are more than one apart, of all sizes, mixed with others
    size = 10 ** cases.uniform(generator, 6, 38, 2, shape[0], 1, 1).float()
    for at, sign in ((3, 1), (4, -1)):
        huge = sign * size[torch.randint(2, shape, generator=generator), torch.arange(shape[0])[:, None, None], 0, 0]
        other = cases.uniform(generator, -30, 30, *shape).float()
        case.sequence[at].copy_(torch.where(torch.rand(shape, generator=generator) < 0.4, huge, other))
    assert_close(cases.run(case, backend), cases.run(case, "reference"))


@pytest.mark.skipif("cpp" not in cases.BACKENDS, reason="the compiled kernels are not built")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gates_beyond_ten_thousand_are_numbers_like_any_others(dtype: torch.dtype) -> None:
    ones = torch.ones(1, 2, 1, 1, dtype=dtype)
    value = torch.tensor([1.0, 2.0], dtype=dtype).view(1, 2, 1, 1)
    gates = torch.tensor([[[30000.0], [15000.0]], [[0.0], [-20000.0]]], dtype=dtype)
    hidden, _ = mlstm_sequence(ones, ones, value, gates[:1], gates[1:], backend="cpp")
    assert_close(hidden, value)
