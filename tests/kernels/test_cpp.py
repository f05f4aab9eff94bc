"""Facts about the compiled kernels alone: builds, fallback, threads, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_close
from tests.kernels import cases
from xlstm_rl.kernels import backend_info, cpp_extension, why_not

ROOT = Path(__file__).parents[2]
needs_extension = pytest.mark.skipif(
    cpp_extension.extension().module is None, reason="the compiled kernels are not built"
)
every_operation = pytest.mark.parametrize("operation", cases.OPERATIONS)
EQUALS_REFERENCE = """
from tests.conftest import assert_close
from tests.kernels import cases
for operation in cases.OPERATIONS:
    for forget_activation in ("sigmoid", "exp"):
        for size in (1, 5, 16, 33):
            case = cases.make_case(operation, B=3, T=70, K=size, V=size, gate=5.0, forget_activation=forget_activation)
            assert_close(cases.evaluate(case, "auto"), cases.evaluate(case, "reference"))
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_switch_forces_the_torch_forms_without_a_warning() -> None:
    program = (
        "from xlstm_rl import backend_info; info = backend_info()['cpu']; print(info.in_use, info.unusable['cpp'])"
    )
    done = run(program, XLSTM_RL_NATIVE="0", PYTHONWARNINGS="error")
    assert done.stdout.strip() == "torch XLSTM_RL_NATIVE=0 switches the compiled kernels off", done.stderr


def test_switched_off_kernels_are_replaced_by_equal_ones() -> None:
    done = run(EQUALS_REFERENCE, XLSTM_RL_NATIVE="0")
    assert done.returncode == 0, done.stderr


def test_missing_build_is_told_once_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "_builds", lambda: ["none"])
    monkeypatch.delenv(cpp_extension.SWITCH, raising=False)
    cpp_extension.extension.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"were not built: the torch forms serve.* install a C\+\+ compiler"):
            assert backend_info()["cpu"].in_use == "torch"
        assert "python setup.py build_ext --inplace" in backend_info()["cpu"].unusable["cpp"]
    finally:
        cpp_extension.extension.cache_clear()


def test_no_compiler_is_advised_where_none_would_do() -> None:
    assert "Windows Subsystem for Linux" in cpp_extension._how_to_build("nt")
    assert "g++ or clang" in cpp_extension._how_to_build("posix")


@needs_extension
@pytest.mark.filterwarnings("ignore:the compiled kernels were built from other sources")
def test_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "INTERFACE", -1)
    cpp_extension.extension.cache_clear()
    try:
        reason = why_not("cpp", torch.zeros(1))
        assert reason is not None and reason.startswith("the compiled kernels were built from other sources")
    finally:
        cpp_extension.extension.cache_clear()


@needs_extension
@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_builds_for_lesser_processors_compute_the_same(capability: str) -> None:
    done = run(EQUALS_REFERENCE, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr


@needs_extension
@every_operation
@pytest.mark.parametrize(("B", "H"), ((1, 1), (1, 3), (5, 1), (3, 2)))
def test_threads_do_not_change_the_result(operation: str, B: int, H: int) -> None:
    case = cases.make_case(operation, B=B, T=50, H=H)
    expected = cases.evaluate(case, "cpp")
    torch.set_num_threads(3)
    try:
        assert_close(cases.evaluate(case, "cpp"), expected)
    finally:
        torch.set_num_threads(1)


@needs_extension
@every_operation
def test_second_derivative_is_refused(operation: str) -> None:
    case = cases.leaves(cases.make_case(operation, T=3))
    hidden, _ = cases.run(case, "cpp")
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice; .* backend='reference'"):
        torch.autograd.grad(hidden.sum(), case.sequence, create_graph=True)


@needs_extension
@every_operation
def test_denormals_count_as_they_did_after_a_call(operation: str) -> None:
    tiny = torch.tensor(1e-40)
    cases.run(cases.make_case(operation), "cpp")
    assert float(tiny * 0.5) > 0


@needs_extension
@every_operation
def test_expanded_arguments_are_read_right(operation: str) -> None:
    case = cases.make_case(operation, B=3, T=20)
    expanded = tuple(x[:1].expand_as(x) for x in case.sequence)
    dense = tuple(x.contiguous() for x in expanded)
    assert_close(cases.run(case._replace(sequence=expanded), "cpp"), cases.run(case._replace(sequence=dense), "cpp"))


@needs_extension
def test_other_kinds_of_tensors_are_passed_over() -> None:
    assert "run on the CPU, not on meta" in (why_not("cpp", torch.zeros(1, device="meta")) or "")
    assert "torch.bfloat16" in (why_not("cpp", torch.zeros(1, dtype=torch.bfloat16)) or "")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_operation
def test_auto_can_be_transformed_by_torch_func(operation: str) -> None:
    case = cases.make_case(operation, B=2, T=1, reset=0.0)

    def hidden_of(x: torch.Tensor) -> torch.Tensor:
        return cases.run(case._replace(sequence=(x, *case.sequence[1:])), "auto")[0]

    stacked = torch.stack((case.sequence[0], case.sequence[0]))
    with torch.no_grad():
        assert_close(torch.vmap(hidden_of)(stacked)[1], hidden_of(case.sequence[0]))


def test_install_without_a_compiler_succeeds_and_holds_no_extension(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "xlstm_rl", source / "xlstm_rl", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        ".",
    ]
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run(command, cwd=source, env=os.environ | broken, capture_output=True, check=True)
    assert (target / "xlstm_rl" / "kernels" / "dispatch.py").is_file()
    assert not list(target.rglob("*.so"))
    program = "import xlstm_rl; print(xlstm_rl.__file__, xlstm_rl.backend_info()['cpu'].in_use)"
    environment = os.environ | {"PYTHONPATH": str(target), cpp_extension.SWITCH: "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, in_use = done.stdout.split()
    assert Path(file).is_relative_to(target)
    assert in_use == "torch"
    assert done.stderr.count("install a C++ compiler") == 1
