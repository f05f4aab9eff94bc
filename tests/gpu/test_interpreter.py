"""The GPU kernels run by Triton's interpreter, against the recurrences in float64; `make test-triton` runs it.

Needs a process of its own with TRITON_INTERPRET=1. Unwritten outputs are NaN here, and addresses out of range and races
between programs are errors.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_parts
from tests.conftest import TOLERANCE, assert_close
from tests.kernels import cases
from xlstm_rl.kernels import ForgetActivation, dispatch, triton_backend, triton_configs, triton_operators

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter needs a process with TRITON_INTERPRET=1", allow_module_level=True)

from tests.gpu import interpreter

interpreter.install()
every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)
every_activation = pytest.mark.parametrize("forget_activation", ("sigmoid", "exp"))
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
every_width = pytest.mark.parametrize("D", (16, 32, 64, 128))

_library = torch.library.Library("xlstm_rl", "IMPL")
for _name in ("mlstm", "mlstm_backward", "slstm", "slstm_backward"):
    _library.impl(_name, getattr(triton_operators, f"launch_{_name}"), "CPU")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "triton" run on the CPU."""
    backend = dispatch._BACKENDS["triton"]._replace(why_not=lambda tensor: None)
    monkeypatch.setitem(dispatch._BACKENDS, "triton", backend)


def make(operation: str, D: int = 16, T: int = 20, dtype: torch.dtype = torch.float32, **options: Any) -> cases.Case:
    """A case of one covered width whose inputs have the given dtype; values of another width with V."""
    options = {"B": 2, "H": 1, "gate": 5.0, **options}
    case = cases.cast(cases.make_case(operation, T=T, K=D, **{"V": D, **options}), torch.float32)
    return case._replace(
        sequence=tuple(x.to(dtype) for x in case.sequence), weights=tuple(x.to(dtype) for x in case.weights)
    )


def reference(case: cases.Case) -> cases.Result:
    return cases.evaluate(cases.cast(case, torch.float64), "reference")


def assert_close_as(dtype: torch.dtype, actual: Any, expected: Any) -> None:
    """Compare with the tolerance of the inputs, which that of float32 states follows."""
    if isinstance(actual, Tensor):
        assert_close(actual.to(dtype), expected)
        return
    for a, e in zip(actual, expected, strict=True):
        assert_close_as(dtype, a, e)


@every_operation
@every_dtype
@every_width
def test_every_width_equals_the_reference(operation: str, D: int, dtype: torch.dtype) -> None:
    case = make(operation, D, 20 if operation == "mlstm" else 3, dtype)
    assert_close_as(dtype, cases.evaluate(case, "triton"), reference(case))


@every_dtype
@pytest.mark.parametrize("D", (64, 128))
def test_streamed_recurrent_weights_equal_the_reference(
    D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_configs, "shared_memory", lambda device: 64 * triton_configs.KIB)
    case = make("slstm", D, 3, dtype)
    assert triton_configs.launch_for("slstm_forward", case.sequence[0]).streams
    assert_close_as(dtype, cases.evaluate(case, "triton"), reference(case))


@every_operation
@every_dtype
@every_activation
@pytest.mark.parametrize("T", (1, 2, 16, 17, 50))
def test_every_length_equals_the_reference(
    operation: str, T: int, forget_activation: ForgetActivation, dtype: torch.dtype
) -> None:
    T = T if operation == "mlstm" else min(T, 12)
    case = make(operation, T=T, dtype=dtype, H=2, forget_activation=forget_activation, gate=1.0)
    assert_close_as(dtype, cases.evaluate(case, "triton"), reference(case))


@every_operation
@every_dtype
def test_bfloat16_inputs_give_float32_states(operation: str, dtype: torch.dtype) -> None:
    hidden, state = cases.run(make(operation, T=3, dtype=dtype), "triton")
    assert hidden.dtype == dtype
    assert all(leaf.dtype == torch.float32 for leaf in state)


@every_operation
@pytest.mark.parametrize("reset", (0.0, 0.05, 0.5, 1.0))
@pytest.mark.parametrize("empty_state", (False, True))
def test_steep_gates_and_resets_equal_the_reference(operation: str, reset: float, empty_state: bool) -> None:
    case = make(operation, T=40 if operation == "mlstm" else 10, gate=15.0, reset=reset, empty_state=empty_state)
    assert_close(cases.evaluate(case, "triton"), reference(case))


@pytest.mark.parametrize("start", (0, 15, 16, 17, 31, 32))
def test_resets_at_chunk_edges_equal_the_reference(start: int) -> None:
    case = make("mlstm", T=33, reset=0.0)
    case.reset[0, start : start + 2] = True
    assert_close(cases.evaluate(case, "triton"), reference(case))


def test_forget_gates_above_one_after_a_reset_equal_the_reference() -> None:
    case = make("mlstm", T=20, forget_activation="exp", gate=1.0, reset=0.2)
    case.sequence[3].sub_(5.0)
    case.sequence[4].copy_(case.sequence[4].abs())
    assert_close(cases.evaluate(case, "triton"), reference(case))


@pytest.mark.parametrize(("dtype", "allowed"), ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("open_gates", (3.0, 15.0))
def test_long_sequence_stays_precise(dtype: torch.dtype, allowed: float, open_gates: float) -> None:
    case = make("mlstm", B=1, T=400, gate=1.0, reset=0.001)
    case.sequence[4].add_(open_gates)
    case = case._replace(sequence=tuple(x.to(dtype) for x in case.sequence))
    actual, exact = cases.evaluate(case, "triton"), reference(case)
    pairs = zip((actual.hidden, *actual.sequence_gradient), (exact.hidden, *exact.sequence_gradient), strict=True)
    errors = [float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt()) for a, e in pairs]
    assert max(errors) <= allowed, errors


@pytest.mark.parametrize("V", (3, 16, 20, 40))
def test_other_widths_of_values_equal_the_reference(V: int) -> None:
    case = make("mlstm", V=V, T=18)
    assert_close(cases.evaluate(case, "triton"), reference(case))


@every_operation
@pytest.mark.parametrize("B", (1, 15, 17))
def test_every_batch_size_equals_the_reference(operation: str, B: int) -> None:
    case = make(operation, T=3, B=B)
    assert_close(cases.evaluate(case, "triton"), reference(case))


@every_operation
def test_sequence_equals_its_steps(operation: str) -> None:
    case = make(operation, T=18 if operation == "mlstm" else 6, gate=15.0, reset=0.2)
    hidden, state = [], case.state
    for t in range(case.reset.shape[1]):
        h, state = cases.run(cases.steps(case, slice(t, t + 1))._replace(state=state), "triton")
        hidden.append(h)
    assert_close((torch.cat(hidden, 1), state), cases.run(case, "triton"))


@every_operation
@pytest.mark.parametrize("middle", (1, 5))
def test_sequence_equals_its_two_halves_with_the_state_carried(operation: str, middle: int) -> None:
    case = make(operation, T=20 if operation == "mlstm" else 8)
    whole = cases.evaluate(case, "triton")
    case = cases.leaves(case)
    first, state = cases.run(cases.steps(case, slice(middle)), "triton")
    second, state = cases.run(cases.steps(case, slice(middle, None))._replace(state=state), "triton")
    hidden = torch.cat((first, second), 1)
    assert_close(cases.Result(hidden, state, *cases.differentiate(case, hidden, state)), whole)


@every_operation
@pytest.mark.parametrize("t", (0, 3, 7))
def test_no_gradient_crosses_a_reset(operation: str, t: int) -> None:
    case = cases.leaves(make(operation, T=20 if operation == "mlstm" else 8))
    case.reset[:, t] = True
    hidden, state = cases.run(case, "triton")
    sequence, _, initial = cases.differentiate(case, hidden[:, t:], state)
    assert all(int(g[:, :t].count_nonzero()) == 0 for g in sequence)
    assert all(int(g.count_nonzero()) == 0 for g in initial)


@every_operation
def test_a_spoilt_row_leaves_the_other_rows_alone(operation: str) -> None:
    case = make(operation, T=6)
    expected, _ = cases.run(case, "triton")
    for x in (*case.sequence, *case.state):
        x[1] = float("nan")
    hidden, _ = cases.run(case, "triton")
    assert_close(hidden[0], expected[0])


@every_operation
@every_activation
@pytest.mark.parametrize("T", (1, 18))
@pytest.mark.parametrize("signs", ((1, 1), (1, -1), (-1, 1), (-1, -1)))
def test_gates_at_100_give_finite_values_and_gradients(
    operation: str, T: int, forget_activation: ForgetActivation, signs: tuple[int, int]
) -> None:
    T = T if operation == "mlstm" else min(T, 3)
    case = make(operation, T=T, forget_activation=forget_activation, empty_state=True)
    if operation == "mlstm":
        case.sequence[3].fill_(100.0 * signs[0])
        case.sequence[4].fill_(100.0 * signs[1])
    else:
        case.sequence[0].copy_(torch.tensor((*signs, 1.0, -1.0))[:, None, None] * 100.0)
    result = cases.evaluate(case, "triton")
    tensors = (result.hidden, *result.state, *(g for gradients in result[2:] for g in gradients))
    assert all(bool(x.isfinite().all()) for x in tensors)


@every_operation
@pytest.mark.parametrize("T", (0, 1, 4))
def test_no_state_is_the_empty_state(operation: str, T: int) -> None:
    case = make(operation, T=T, empty_state=True)
    without = case._replace(reset=torch.zeros_like(case.reset))
    assert_close(cases.run_without_state(case, "triton"), cases.run(without, "triton"))


@every_operation
def test_strided_arguments_give_the_same(operation: str) -> None:
    case = make(operation, T=4, H=2)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.sequence)
    assert_close(cases.evaluate(case._replace(sequence=strided), "triton"), cases.evaluate(case, "triton"))


@every_operation
def test_no_gradient_flows_through_the_stabilizer(operation: str) -> None:
    _, state = cases.run(cases.leaves(make(operation, T=2)), "triton")
    assert not state.stabilizer.requires_grad


@every_operation
def test_second_derivatives_are_refused(operation: str) -> None:
    case = cases.leaves(make(operation, T=2))
    hidden, _ = cases.run(case, "triton")
    (gradient,) = torch.autograd.grad(hidden.sum(), case.sequence[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use backend='reference'"):
        gradient.sum().backward()


@every_operation
@every_dtype
def test_operator_keeps_the_rules_of_torch(operation: str, dtype: torch.dtype) -> None:
    case = cases.leaves(make(operation, T=2, B=1, dtype=dtype))
    arguments = (*case.sequence, *case.weights, *case.state, case.reset, "sigmoid", True)
    operator = getattr(torch.ops.xlstm_rl, operation)
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@every_operation
def test_compiled_call_is_one_graph_and_equal(operation: str) -> None:
    def loss(x: Tensor, *rest: Tensor) -> Tensor:
        hidden, state = cases.run(case._replace(sequence=(x, *rest)), "triton")
        return (hidden * hidden).sum() + state[0].sum()

    case = cases.leaves(make(operation, T=4))
    expected = loss(*case.sequence)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(*case.sequence)
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, case.sequence), torch.autograd.grad(expected, case.sequence))


ON_CPU = gpu_parts.Plan(device="cpu")


@pytest.mark.parametrize("kernel", gpu_parts.KERNELS)
@every_dtype
def test_gpu_check_finds_no_error(kernel: str, dtype: torch.dtype) -> None:
    row = gpu_parts.check_case(ON_CPU, kernel, 16, dtype, 1 if kernel == "mlstm_step" else 3, "sigmoid")
    assert row["status"] == gpu_parts.RIGHT, row


def test_gpu_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_backend.mlstm_fused
    backend = dispatch._BACKENDS["triton"]._replace(mlstm=lambda q, k, v, *rest: right(q, k, v * 1.01, *rest))
    monkeypatch.setitem(dispatch._BACKENDS, "triton", backend)
    row = gpu_parts.check_case(ON_CPU, "mlstm_forward", 16, torch.float32, 3, "sigmoid")
    assert row["status"] == gpu_parts.WRONG


def test_tolerance_of_bfloat16_is_a_few_of_its_roundings() -> None:
    assert TOLERANCE[torch.bfloat16] <= 4 * torch.finfo(torch.bfloat16).eps


SPOILT = [("mlstm", at) for at in range(5)] + [("slstm", 0)]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize(("operation", "at"), SPOILT, ids=lambda value: str(value))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("again", (7, 18))
def test_a_spoilt_step_reaches_no_other_episode_and_no_step_before(
    operation: str, at: int, value: float, again: int
) -> None:
    case = make(operation, T=20 if operation == "mlstm" else 9)
    again = min(again, 7) if operation == "slstm" else again
    case.reset[0] = False
    case.reset[0, again] = True
    sequence = [x.clone() for x in case.sequence]
    sequence[at][0, 5].view(-1)[-1] = value
    hidden, state = cases.run(case._replace(sequence=tuple(sequence)), "triton")
    expected, expected_state = cases.run(case, "triton")
    clean = torch.ones(case.reset.shape, dtype=torch.bool)
    clean[0, 5:again] = False
    assert_close(hidden[clean], expected[clean])
    assert_close(state, expected_state)
    assert not bool(hidden[0, 5].isfinite().all()) or value == float("inf")


@every_operation
@pytest.mark.parametrize("T", (1, 9))
def test_a_spoilt_state_ends_at_an_episode_start(operation: str, T: int) -> None:
    case = make(operation, T=T)
    case.reset[0, 0] = True
    spoilt = cases.like(case.state, (x.clone() for x in case.state))
    for leaf in spoilt:
        leaf[0] = float("nan")
    assert_close(cases.run(case._replace(state=spoilt), "triton"), cases.run(case, "triton"))
