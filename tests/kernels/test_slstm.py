"""Facts about the sLSTM alone: the empty state, extreme gates, long sequences."""

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import SLSTMState, slstm_sequence

every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_fast_backend = pytest.mark.parametrize("backend", cases.FAST_BACKENDS)


@every_backend
@pytest.mark.parametrize("input_gate", (-200.0, -1.0, 50.0))
def test_first_step_does_not_depend_on_the_input_gate(backend: str, input_gate: float) -> None:
    gates = torch.tensor([input_gate, 3.0, 0.5, -0.25]).view(1, 1, 4, 1, 1)
    hidden, state = slstm_sequence(gates, torch.ones(4, 1, 1, 1), backend=backend)
    expected = torch.sigmoid(torch.tensor(-0.25)) * torch.tanh(torch.tensor(0.5))
    assert_close(hidden.flatten(), expected.view(1))
    assert_close(state.normalizer.flatten(), torch.ones(1))


@every_backend
def test_recurrent_weights_are_stored_as_out_in(backend: str) -> None:
    gates = torch.zeros(1, 1, 4, 1, 2)
    recurrent = torch.zeros(4, 1, 2, 2)
    recurrent[2, 0, 0, 1] = 1.0
    state = SLSTMState(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0.7]]]), torch.zeros(1, 1, 2))
    hidden, _ = slstm_sequence(gates, recurrent, state, backend=backend)
    assert_close(hidden.flatten(), torch.tensor([0.5 * torch.tanh(torch.tensor(0.7)).item(), 0.0]))


@every_backend
@pytest.mark.parametrize("T", (1, 5))
def test_empty_units_and_full_units_live_in_one_state(backend: str, T: int) -> None:
    case = cases.make_case("slstm", T=T, reset=0.0)
    empty = torch.zeros_like(case.state.normalizer, dtype=torch.bool)
    empty[0] = True
    case = case._replace(state=SLSTMState._make(x.masked_fill(empty, 0.0) for x in case.state))
    fresh = cases.rows(case, slice(0, 1))
    assert_close(
        cases.run(case, backend)[0][:1], cases.run(fresh._replace(state=cases.emptied(fresh.state)), backend)[0]
    )


@every_backend
@pytest.mark.parametrize("T", (1, 30))
def test_normalizer_is_at_least_one_after_any_step(backend: str, T: int) -> None:
    case = cases.make_case("slstm", T=T, gate=100.0, empty_state=True)
    _, state = cases.run(cases.cast(case, torch.float32), backend)
    assert bool((state.normalizer >= 1).all())


@every_backend
def test_no_gradient_flows_through_the_stabilizer(backend: str) -> None:
    _, state = cases.run(cases.leaves(cases.make_case("slstm", T=4)), backend)
    assert not state.stabilizer.requires_grad


@every_fast_backend
def test_long_sequence_equals_the_reference(backend: str) -> None:
    case = cases.make_case("slstm", B=1, T=600, H=1, K=3, gate=3.0, reset=0.01)
    assert_close(cases.evaluate(case, backend), cases.evaluate(case, "reference"))


@every_fast_backend
def test_float32_stays_precise_over_4096_steps(backend: str) -> None:
    case = cases.make_case("slstm", B=1, T=4096, H=2, K=16, gate=1.0, reset=0.001)
    case = case._replace(weights=(case.weights[0] * 0.3,))
    hidden, gradient = cases.rms_errors(case, backend)
    assert hidden <= 2e-6
    assert gradient <= 5e-6


@every_fast_backend
def test_outputs_do_not_share_memory(backend: str) -> None:
    case = cases.make_case("slstm", B=1, T=3, H=1, K=1)
    with torch.no_grad():
        hidden, state = cases.run(case, backend)
    assert isinstance(state, SLSTMState)
    expected = state.hidden.clone()
    hidden.zero_()
    assert torch.equal(state.hidden, expected)


def test_second_derivative_of_the_scan_is_refused() -> None:
    case = cases.leaves(cases.make_case("slstm", T=3))
    hidden, _ = cases.run(case, "torch")
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice; use backend='reference'"):
        torch.autograd.grad(hidden.sum(), case.sequence, create_graph=True)
