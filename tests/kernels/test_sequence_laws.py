"""Laws that every backend of both sequence kernels obeys, in values and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import ForgetActivation

every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)
every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_fast_backend = pytest.mark.parametrize("backend", cases.FAST_BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64))


@every_operation
@every_fast_backend
@given(data=st.data())
def test_backend_equals_the_reference_in_float64(operation: str, backend: str, data: st.DataObject) -> None:
    case = data.draw(cases.cases(operation))
    assert_close(cases.evaluate(case, backend), cases.evaluate(case, "reference"))


@every_operation
@every_fast_backend
@given(data=st.data())
def test_backend_in_float32_equals_the_reference_in_float64(operation: str, backend: str, data: st.DataObject) -> None:
    case = cases.cast(data.draw(cases.cases(operation, exp=False)), torch.float32)
    exact, rough = cases.evaluate(cases.cast(case, torch.float64), "reference"), cases.evaluate(case, "reference")
    assert_close(cases.evaluate(case, backend), exact, rough=rough)


@every_operation
@every_fast_backend
@given(data=st.data())
def test_backend_without_gradients_gives_the_same_values(operation: str, backend: str, data: st.DataObject) -> None:
    case = data.draw(cases.cases(operation))
    expected = cases.evaluate(case, backend)
    with torch.inference_mode():
        assert_close(cases.run(case, backend), (expected.hidden, expected.state))


@every_operation
@every_backend
@given(data=st.data())
def test_sequence_equals_its_steps(operation: str, backend: str, data: st.DataObject) -> None:
    case = data.draw(cases.cases(operation, longest=20))
    hidden, state = [], case.state
    for t in range(case.reset.shape[1]):
        h, state = cases.run(cases.steps(case, slice(t, t + 1))._replace(state=state), backend)
        hidden.append(h)
    assert_close((torch.cat(hidden, 1), state), cases.run(case, backend))


@every_operation
@every_backend
@given(data=st.data())
def test_sequence_equals_its_two_halves_with_the_state_carried(
    operation: str, backend: str, data: st.DataObject
) -> None:
    case = data.draw(cases.cases(operation, shortest=2))
    middle = data.draw(st.integers(0, case.reset.shape[1]), label="middle")
    whole = cases.evaluate(case, backend)
    case = cases.leaves(case)
    first, state = cases.run(cases.steps(case, slice(middle)), backend)
    second, state = cases.run(cases.steps(case, slice(middle, None))._replace(state=state), backend)
    hidden = torch.cat((first, second), 1)
    assert_close(cases.Result(hidden, state, *cases.differentiate(case, hidden, state)), whole)


@every_operation
@every_backend
@given(data=st.data())
def test_reset_in_mid_sequence_equals_a_fresh_start(operation: str, backend: str, data: st.DataObject) -> None:
    case = data.draw(cases.cases(operation))
    t = data.draw(st.integers(0, case.reset.shape[1] - 1), label="t")
    case.reset[:, t] = True
    hidden, state = cases.run(case, backend)
    fresh = cases.steps(case, slice(t, None))
    fresh.reset[:, 0] = False
    assert_close((hidden[:, t:], state), cases.run(fresh._replace(state=cases.emptied(case.state)), backend))


@every_operation
@every_backend
@given(data=st.data())
def test_no_gradient_crosses_a_reset(operation: str, backend: str, data: st.DataObject) -> None:
    case = cases.leaves(data.draw(cases.cases(operation)))
    t = data.draw(st.integers(0, case.reset.shape[1] - 1), label="t")
    case.reset[:, t] = True
    hidden, state = cases.run(case, backend)
    sequence, _, initial = cases.differentiate(case, hidden[:, t:], state)
    assert all(int(g[:, :t].count_nonzero()) == 0 for g in sequence)
    assert all(int(g.count_nonzero()) == 0 for g in initial)


@every_operation
@every_backend
@given(data=st.data())
def test_row_does_not_depend_on_the_other_rows(operation: str, backend: str, data: st.DataObject) -> None:
    case = data.draw(cases.cases(operation))
    hidden, state = cases.run(case, backend)
    for row in range(case.reset.shape[0]):
        one = slice(row, row + 1)
        expected = (hidden[one], tuple(leaf[one] for leaf in state))
        assert_close(cases.run(cases.rows(case, one), backend), expected)


@every_operation
@every_backend
def test_a_spoilt_row_leaves_the_other_rows_alone(operation: str, backend: str) -> None:
    case = cases.make_case(operation, B=2, T=40)
    expected, _ = cases.run(case, backend)
    for x in (*case.sequence, *case.state):
        x[1] = float("nan")
    hidden, _ = cases.run(case, backend)
    assert_close(hidden[0], expected[0])


@every_operation
@every_backend
@pytest.mark.parametrize("T", (1, 5))
def test_gradients_equal_finite_differences(operation: str, backend: str, T: int) -> None:
    case = cases.leaves(cases.make_case(operation, B=2, T=T, H=1, K=2, V=3, gate=2.0, reset=0.2))
    S, W = len(case.sequence), len(case.weights)

    def outputs(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = cases.like(case.state, (*x[S + W :], case.state.stabilizer))
        hidden, state = cases.run(case._replace(sequence=x[:S], weights=x[S : S + W], state=state), backend)
        scale = state.stabilizer.exp()
        if operation == "mlstm":
            return hidden, state[0] * scale[..., None, None], state[1] * scale[..., None]
        return hidden, state[0] * scale, state[1] * scale

    inputs = (*case.sequence, *case.weights, *cases.carrying_gradient(case.state))
    assert torch.autograd.gradcheck(outputs, inputs)


@every_operation
@every_backend
@every_dtype
@pytest.mark.parametrize("T", (1, 2, 40))
@pytest.mark.parametrize("empty_state", (False, True))
@pytest.mark.parametrize("forget_activation", ("sigmoid", "exp"))
@pytest.mark.parametrize("signs", ((1, 1), (1, -1), (-1, 1), (-1, -1)))
def test_gates_at_100_give_finite_values_and_gradients(
    operation: str,
    backend: str,
    dtype: torch.dtype,
    T: int,
    empty_state: bool,
    forget_activation: ForgetActivation,
    signs: tuple[int, int],
) -> None:
    case = cases.make_case(operation, T=T, empty_state=empty_state, forget_activation=forget_activation)
    if operation == "mlstm":
        case.sequence[3].fill_(100.0 * signs[0])
        case.sequence[4].fill_(100.0 * signs[1])
    else:
        case.sequence[0].copy_(torch.tensor((*signs, 1.0, -1.0))[:, None, None] * 100.0)
    result = cases.evaluate(cases.cast(case, dtype), backend)
    tensors = (result.hidden, *result.state, *(g for gradients in result[2:] for g in gradients))
    assert all(bool(x.isfinite().all()) for x in tensors)


@every_operation
@every_backend
@pytest.mark.parametrize("empty_state", (False, True))
def test_empty_sequence_returns_the_state(operation: str, backend: str, empty_state: bool) -> None:
    case = cases.make_case(operation, T=0, empty_state=empty_state)
    hidden, state = cases.run(case, backend)
    assert hidden.shape[1] == 0
    assert_close(state, case.state)


@every_operation
@every_backend
@pytest.mark.parametrize("T", (0, 1, 9))
def test_no_state_is_the_empty_state(operation: str, backend: str, T: int) -> None:
    case = cases.make_case(operation, T=T, empty_state=True)
    without = case._replace(reset=torch.zeros_like(case.reset))
    assert_close(cases.run_without_state(case, backend), cases.run(without, backend))


@every_operation
@every_backend
@pytest.mark.parametrize("T", (1, 9))
def test_arguments_are_left_alone(operation: str, backend: str, T: int) -> None:
    case = cases.make_case(operation, T=T)
    before = [x.clone() for x in (*case.sequence, *case.weights, *case.state, case.reset)]
    with torch.no_grad():
        cases.run(case, backend)
    cases.evaluate(case, backend)
    after = (*case.sequence, *case.weights, *case.state, case.reset)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
