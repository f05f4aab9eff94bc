"""Facts about the GPU operators that need neither a GPU nor Triton: shapes, gradients and tracing.

The torch forms stand in for the kernels, which are tested in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import dispatch, triton_backend, triton_operators  # noqa: F401 (registers them)
from xlstm_rl.kernels.mlstm_chunkwise import mlstm_chunkwise
from xlstm_rl.kernels.slstm_scan import slstm_scan
from xlstm_rl.kernels.states import MLSTMState, SLSTMState
from xlstm_rl.kernels.triton_configs import KIB, DeviceFacts, slstm_trace_fields

every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


def _mlstm(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, activation, keep = arguments
    q, k, v, input_gate, forget_gate, *state, reset = (x.float() if x.is_floating_point() else x for x in tensors)
    hidden, last = mlstm_chunkwise(q, k, v, input_gate, forget_gate, MLSTMState(*state), reset, activation)
    trace = q.new_zeros(2, q.shape[0], q.shape[1] if keep else 0, q.shape[2])
    return hidden.to(tensors[2].dtype), *(x.clone(memory_format=torch.contiguous_format) for x in last), trace


def _slstm(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, activation, keep = arguments
    gates, recurrent, *state, reset = (x.float() if x.is_floating_point() else x for x in tensors)
    output, last = slstm_scan(gates, recurrent, SLSTMState(*state), reset, activation)
    B, T, _, H, D = gates.shape
    trace = gates.new_zeros(slstm_trace_fields(tensors[0]), B, T if keep else 0, H, D)
    return output.to(tensors[0].dtype), *(x.clone(memory_format=torch.contiguous_format) for x in last), trace


def _backward(
    forward: Any, slopes: tuple[Tensor, ...], tensors: tuple[Tensor, ...], wanted: int, activation: str
) -> Any:
    def differentiate() -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_(i < wanted) for i, x in enumerate(tensors)]
        outputs = forward(*leaves, activation, True)[: len(slopes)]
        return torch.autograd.grad(outputs, leaves[:wanted], slopes, materialize_grads=True)

    # Inside an operator this thread records nothing to differentiate.
    with ThreadPoolExecutor(1) as other_thread:
        return tuple(
            g.clone(memory_format=torch.contiguous_format) for g in other_thread.submit(differentiate).result()
        )


@pytest.fixture(autouse=True)
def torch_forms() -> Iterator[None]:
    """Stand in for the kernels, on the CPU."""
    with torch.library._scoped_library("xlstm_rl", "IMPL") as library:
        library.impl("mlstm", _mlstm, "CPU")
        library.impl("slstm", _slstm, "CPU")
        library.impl("mlstm_backward", lambda *x: _backward(_mlstm, x[:3], x[3:12], 7, x[-1]), "CPU")
        library.impl("slstm_backward", lambda *x: _backward(_slstm, x[:4], x[4:11], 5, x[-1]), "CPU")
        yield


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "triton" take CPU tensors."""
    backend = dispatch._BACKENDS["triton"]._replace(why_not=lambda tensor: None)
    monkeypatch.setitem(dispatch._BACKENDS, "triton", backend)


def make(operation: str, dtype: torch.dtype, T: int = 5) -> cases.Case:
    case = cases.leaves(cases.cast(cases.make_case(operation, K=16, V=16, T=T, gate=1.0), torch.float32))
    return case._replace(
        sequence=tuple(x.detach().to(dtype).requires_grad_() for x in case.sequence),
        weights=tuple(x.detach().to(dtype).requires_grad_() for x in case.weights),
    )


def without_gradients(case: cases.Case) -> cases.Case:
    return case._replace(
        sequence=tuple(x.detach() for x in case.sequence),
        weights=tuple(x.detach() for x in case.weights),
        state=cases.like(case.state, (x.detach() for x in case.state)),
    )


def flat(case: cases.Case) -> tuple[Any, ...]:
    return (*case.sequence, *case.weights, *case.state, case.reset, case.forget_activation)


@every_operation
@every_dtype
@pytest.mark.parametrize("keep", (False, True))
def test_operator_keeps_the_rules_of_torch(operation: str, dtype: torch.dtype, keep: bool) -> None:
    case = make(operation, dtype) if keep else without_gradients(make(operation, dtype))
    result = torch.library.opcheck(getattr(torch.ops.xlstm_rl, operation), (*flat(case), keep))
    assert set(result.values()) == {"SUCCESS"}


@every_operation
@every_dtype
def test_backward_operator_keeps_the_rules_of_torch(operation: str, dtype: torch.dtype) -> None:
    case = without_gradients(make(operation, dtype))
    hidden, *last, trace = getattr(torch.ops.xlstm_rl, operation)(*flat(case), True)
    saved = (hidden, *last[:2], trace) if operation == "mlstm" else (hidden, trace)
    slopes = (hidden, *last[:-1])
    *tensors, activation = flat(case)
    operator = getattr(torch.ops.xlstm_rl, f"{operation}_backward")
    tests = ("test_schema", "test_faketensor")
    result = torch.library.opcheck(operator, (*slopes, *tensors, *saved, activation), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


@every_operation
def test_gradients_through_the_operator_are_those_of_the_stand_in(operation: str, anywhere: None) -> None:
    case = make(operation, torch.float32)
    assert_close(cases.evaluate(case, "triton"), cases.evaluate(case, "torch"))


@every_operation
@every_dtype
def test_compiled_call_is_one_graph_for_every_batch_and_length(
    operation: str, dtype: torch.dtype, anywhere: None
) -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for T in (5, 7, 16):
        case = make(operation, dtype, T)
        assert_close(compiled(case), loss(case))
    assert len(graphs) == 1


def loss(case: cases.Case) -> Tensor:
    hidden, state = cases.run(case, "triton")
    return hidden.float().square().sum() + state[0].sum()


@every_operation
@every_dtype
def test_call_on_fake_gpu_tensors_is_one_graph(
    operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "_TRITON", (3, 7))
    monkeypatch.setattr(triton_backend, "device_facts", lambda device: DeviceFacts((9, 0), 227 * KIB, is_amd=False))
    case = without_gradients(make(operation, dtype))
    torch._dynamo.reset()
    with FakeTensorMode():
        sequence, weights, state = (
            tuple(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tensors)
            for tensors in (case.sequence, case.weights, case.state)
        )
        reset = torch.empty(case.reset.shape, dtype=torch.bool, device="cuda")
        on_gpu = cases.Case(sequence, weights, cases.like(case.state, state), reset, "sigmoid")
        hidden, _ = torch.compile(cases.run, fullgraph=True, backend="aot_eager")(on_gpu, "auto")
    assert (hidden.device.type, hidden.dtype, hidden.shape[:2]) == ("cuda", dtype, case.reset.shape)


@every_operation
@every_dtype
def test_compiled_gradients_are_those_of_the_plain_call(operation: str, dtype: torch.dtype, anywhere: None) -> None:
    case = make(operation, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (*case.sequence, *case.weights)
    expected = torch.autograd.grad(loss(case), inputs)
    assert_close(torch.autograd.grad(compiled(case), inputs), expected)
