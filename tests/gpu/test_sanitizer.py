"""The checks of the mended interpreter fire: on small wrong kernels, and on bugs planted in the real ones.

Needs a process of its own with TRITON_INTERPRET=1; `make test-triton-interpreter` runs it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter needs a process with TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.gpu import interpreter
from xlstm_rl.kernels import mlstm_triton, slstm_triton
from xlstm_rl.kernels.states import MLSTMState, SLSTMState
from xlstm_rl.kernels.triton_arguments import MLSTMInputs, SLSTMInputs

interpreter.install()


@triton.jit
def _copy_too_much(source, target, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(target + i, tl.load(source + i, mask=i < n))


@triton.jit
def _write_the_same(source, target, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i))


@triton.jit
def _read_the_neighbour(source, target, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(source + i, tl.load(source + i + N, mask=i + N < n))


@triton.jit
def _add(source, target, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(source + i)
    tl.store(target + i, x + x)


@pytest.mark.parametrize(
    ("kernel", "message"),
    ((_copy_too_much, "out of bounds"), (_write_the_same, "race on target"), (_read_the_neighbour, "race on source")),
)
def test_interpreter_catches_wrong_kernels(kernel: Any, message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        kernel[(2,)](torch.zeros(12), torch.zeros(12), 12, 8 if kernel is _copy_too_much else 4)


def test_interpreter_refuses_arithmetic_in_bfloat16() -> None:
    with pytest.raises(InterpreterError, match="of bfloat16 would compute on bit patterns"):
        _add[(1,)](torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16), 4, 4)


def planted(module: ModuleType, right: str, wrong: str, folder: Path) -> Any:
    """The module with one place of its source replaced."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module.__name__}"
    file = folder / "planted.py"
    file.write_text(source.replace(right, wrong))
    spec = spec_from_file_location("planted", file)
    assert spec is not None
    assert spec.loader is not None
    result = module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


def run_mlstm(module: Any, dtype: torch.dtype = torch.float32, T: int = 18) -> Any:
    """Two rows of a width of which several programs share a head."""
    B, H, D = 2, 1, 64
    q, k, v = torch.ones(3, B, T, H, D, dtype=dtype)
    gates = torch.ones(2, B, T, H, dtype=dtype)
    inputs = MLSTMInputs(q, k, v, gates[0], gates[1], torch.zeros(B, T, dtype=torch.bool))
    state = MLSTMState(torch.ones(B, H, D, D), torch.ones(B, H, D), torch.ones(B, H))
    return module.forward(inputs, state, "sigmoid", True)


def run_slstm(module: Any) -> Any:
    """Fewer rows than a program has."""
    B, T, H, D = 3, 2, 1, 16
    state = SLSTMState(*torch.ones(4, B, H, D))
    inputs = SLSTMInputs(torch.ones(B, T, 4, H, D), torch.ones(4, H, D, D), torch.zeros(B, T, dtype=torch.bool))
    return module.forward(inputs, state, "sigmoid", True)


def test_real_kernels_pass_the_checks() -> None:
    for result in (run_mlstm(mlstm_triton), run_mlstm(mlstm_triton, T=1), run_slstm(slstm_triton)):
        assert all(bool(x.isfinite().all()) for x in (result[0], *result.last, result.trace))


@pytest.mark.parametrize(
    ("right", "wrong", "T", "message"),
    (
        ("first = tl.program_id(1) == 0", "first = tl.program_id(1) >= 0", 18, "race on outputs.trace"),
        ("if tl.program_id(1) == 0:", "if tl.program_id(1) >= 0:", 1, "race on outputs.last.normalizer"),
        (
            "C = tl.load(state.cell + tile)\n    n = tl.load(state.normalizer + vector)\n    m =",
            "C = tl.load(state.cell + tile + D)\n    n = tl.load(state.normalizer + vector)\n    m =",
            18,
            "out of bounds",
        ),
        ("tl.program_id(1) * BV + tl.arange(0, BV)\n    # What", "tl.arange(0, BV)\n    # What", 18, "race on outputs"),
    ),
)
def test_bug_planted_in_the_mlstm_is_caught(right: str, wrong: str, T: int, message: str, tmp_path: Path) -> None:
    module = planted(mlstm_triton, right, wrong, tmp_path)
    with pytest.raises(InterpreterError, match=message):
        run_mlstm(module, T=T)


@pytest.mark.parametrize(
    ("right", "wrong"),
    (
        ("b, rows = own_rows(B, ROWS)", "b, rows = own_rows(B + 1, ROWS)"),
        ("step = b * T + t\n", "step = b * T + t + 1\n"),
        ("field = H * D * B * T", "field = H * D * B * T + 1"),
    ),
)
def test_bug_planted_in_the_slstm_is_caught(right: str, wrong: str, tmp_path: Path) -> None:
    module = planted(slstm_triton, right, wrong, tmp_path)
    with pytest.raises(InterpreterError, match="out of bounds"):
        run_slstm(module)


def test_output_that_a_kernel_forgets_is_not_a_number(tmp_path: Path) -> None:
    module = planted(mlstm_triton, "tl.store(outputs.last.cell + tile, C)\n    if first", "if first", tmp_path)
    assert bool(run_mlstm(module).last.cell.isnan().all())


def test_arithmetic_in_bfloat16_planted_in_a_kernel_is_refused(tmp_path: Path) -> None:
    right = "tl.load(inputs.forget_gate + head).to(tl.float32)"
    module = planted(mlstm_triton, right, "tl.load(inputs.forget_gate + head)", tmp_path)
    with pytest.raises(InterpreterError, match="bfloat16 would compute on bit patterns"):
        run_mlstm(module, torch.bfloat16, T=1)
