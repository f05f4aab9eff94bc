"""Facts about the GPU backend that need neither a GPU nor Triton; the kernels have their tests in tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels import cases
from xlstm_rl.kernels import dispatch, mlstm_sequence, triton_backend, triton_configs, why_not
from xlstm_rl.kernels.triton_configs import DTYPES, KIB, WIDTHS, DeviceFacts, launch_for

ROOT = Path(__file__).parents[2]
H100 = DeviceFacts((9, 0), 227 * KIB, is_amd=False)
RTX_3090 = DeviceFacts((8, 6), 99 * KIB, is_amd=False)
RTX_2080 = DeviceFacts((7, 5), 64 * KIB, is_amd=False)
MI_300 = DeviceFacts((9, 4), 64 * KIB, is_amd=True)
Q, GATES = (2, 3, 1), (2, 3, 4, 1)  # shapes without the head width


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the GPU that CUDA tensors, which hold nothing here, are on."""
    monkeypatch.setattr(triton_backend, "_TRITON", (3, 7))
    with FakeTensorMode():
        yield lambda facts: monkeypatch.setattr(triton_backend, "device_facts", lambda device: facts)


def on_gpu(shape: tuple[int, ...], D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, D, dtype=dtype, device="cuda")


@pytest.mark.parametrize("facts", (H100, RTX_3090, MI_300), ids=("H100", "RTX 3090", "MI 300"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("D", (16, 32, 64, 128))
def test_both_memories_of_every_width_can_run(gpu: Any, facts: DeviceFacts, D: int, dtype: torch.dtype) -> None:
    gpu(facts)
    assert why_not("triton", on_gpu(Q, D, dtype)) is None
    assert why_not("triton", on_gpu(GATES, D, dtype)) is None


@pytest.mark.parametrize(
    ("facts", "streaming"),
    (
        (H100, {(128, torch.float32)}),
        (RTX_3090, {(128, torch.float32), (128, torch.bfloat16)}),
        (MI_300, {(D, dtype) for D in (64, 128) for dtype in DTYPES}),
    ),
    ids=("H100", "RTX 3090", "MI 300"),
)
def test_recurrent_weights_are_streamed_only_where_they_do_not_fit(
    gpu: Any, facts: DeviceFacts, streaming: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(facts)
    monkeypatch.setattr(triton_configs, "device_facts", lambda device: facts)
    for kernel in ("slstm_forward", "slstm_backward"):
        launches = {(D, dtype): launch_for(kernel, on_gpu(GATES, D, dtype)) for D in WIDTHS for dtype in DTYPES}
        assert {key for key, launch in launches.items() if launch.streams} == streaming


@pytest.mark.parametrize(
    ("facts", "tensor", "reason"),
    (
        (H100, (Q, 48, torch.float32), r"head width 48 is not covered, only \(16, 32, 64, 128\)"),
        (H100, (Q, 16, torch.float64), "dtype torch.float64 is not covered, only torch.float32 and torch.bfloat16"),
        (RTX_2080, (Q, 16, torch.float32), r"compute capability \(7, 5\) is below \(8, 0\)"),
    ),
)
def test_what_is_not_covered_has_a_reason(gpu: Any, facts: DeviceFacts, tensor: Any, reason: str) -> None:
    gpu(facts)
    with pytest.raises(ValueError, match=rf"backend 'triton' cannot run here: .*{reason}"):
        dispatch._choose("triton", on_gpu(*tensor))


def test_missing_triton_is_the_reason(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(H100)
    monkeypatch.setattr(triton_backend, "_TRITON", None)
    assert why_not("triton", on_gpu(Q, 16)) == "the package triton is not installed"


def test_old_triton_is_the_reason(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(H100)
    monkeypatch.setattr(triton_backend, "_TRITON", (3, 1))
    assert why_not("triton", on_gpu(Q, 16)) == "triton 3.1 is too old, 3.5 or newer is needed"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    (
        ("triton", "3.7.1", (3, 7)),
        ("pytorch-triton-rocm", "3.4.0+gitf7888497", (3, 4)),
        ("triton-of-somebody", "1.0", triton_backend._OLDEST_TRITON),
    ),
)
def test_triton_is_found_under_every_name(
    name: str, text: str, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise PackageNotFoundError(asked)
        return text

    monkeypatch.setattr(triton_backend, "find_spec", lambda package: object())
    monkeypatch.setattr(triton_backend, "version", version)
    assert triton_backend._installed_triton() == expected


def test_cpu_is_the_reason() -> None:
    assert why_not("triton", torch.zeros(1, 1, 1, 16)) == "the tensor is on cpu and Triton needs a CUDA device"


def test_auto_on_a_gpu_takes_triton(gpu: Any) -> None:
    gpu(H100)
    assert dispatch._choose("auto", on_gpu(Q, 32)) is dispatch._BACKENDS["triton"]


def test_auto_warns_once_when_it_falls_back_on_a_gpu(gpu: Any) -> None:
    gpu(H100)
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="'triton' is not used here: head width 5 is not covered.*; using 'torch'"):
        assert dispatch._choose("auto", on_gpu(Q, 5)) is dispatch._BACKENDS["torch"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._choose("auto", on_gpu(Q, 5))


def test_bfloat16_where_the_kernels_cannot_run_is_refused(gpu: Any) -> None:
    gpu(H100)
    with pytest.raises(TypeError, match="no backend computes in torch.bfloat16 here.*head width 5 is not covered"):
        dispatch._choose("auto", on_gpu(Q, 5, torch.bfloat16))


def test_state_of_bfloat16_inputs_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = dispatch._BACKENDS["triton"]._replace(why_not=lambda tensor: None)
    monkeypatch.setitem(dispatch._BACKENDS, "triton", backend)
    q = torch.empty(*Q, 16, dtype=torch.bfloat16, device="meta")
    gate = q[..., 0]
    hidden, state = mlstm_sequence(q, q, q, gate, gate)
    assert hidden.dtype == torch.bfloat16
    assert {leaf.dtype for leaf in state} == {torch.float32}
    coarse = state._replace(cell=state.cell.bfloat16())
    with pytest.raises(TypeError, match="state.cell has dtype torch.bfloat16; allowed with inputs in .* is"):
        mlstm_sequence(q, q, q, gate, gate, coarse)


@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("grad", (False, True))
def test_traced_shapes_are_those_of_the_torch_form(operation: str, grad: bool) -> None:
    case = cases.cast(cases.make_case(operation, K=16, V=16, T=3), torch.float32)
    case = cases.leaves(case) if grad else case
    expected = cases.run(case, "torch")
    operator = getattr(torch.ops.xlstm_rl, operation)
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in (*case.sequence, *case.weights, *case.state)]
    hidden, *state, _ = operator(*meta, case.reset.to("meta"), "sigmoid", grad)
    assert [x.shape for x in (hidden, *state)] == [x.shape for x in (expected[0], *expected[1])]
    assert hidden.requires_grad == grad


def test_the_compiler_of_torch_is_not_imported_along() -> None:
    program = "import sys, xlstm_rl.agents; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def _run(file: str, chosen: str, interpret: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return result.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; make test-triton installs it")
@pytest.mark.parametrize(
    ("file", "chosen", "interpret"),
    (
        ("tests/gpu/test_interpreter.py", "every_width and 16", "1"),
        ("tests/gpu/test_compilation.py", "sm_80 and slstm_forward and 16", "0"),
    ),
)
def test_a_few_tests_of_the_kernels_pass(file: str, chosen: str, interpret: str) -> None:
    assert " passed" in _run(file, chosen, interpret)
