"""Facts about the program that checks and times the GPU kernels, on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_parts import FAILED, RIGHT, SKIPPED, WRONG
from xlstm_rl.kernels import dispatch

ROOT = Path(__file__).parents[2]
DRY = gpu_parts.PLANS["dry-run"]


def with_public_kernels(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Install a package of their name whose kernels are all the given one."""
    for name in ("mlstm_kernels", "mlstm_kernels.torch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["mlstm_kernels.torch"].get_mlstm_kernel = lambda name: kernel  # type: ignore[attr-defined]


def with_mlstm(monkeypatch: pytest.MonkeyPatch, replacement: Callable[..., Any]) -> None:
    """Put another function, called with the right one and its arguments, in the place of the mLSTM that is checked."""
    right = dispatch._BACKENDS["torch"]
    wrong = right._replace(mlstm=lambda *given, **named: replacement(right.mlstm, *given, **named))
    monkeypatch.setitem(dispatch._BACKENDS, "torch", wrong)


def statuses(part: str) -> list[str]:
    return [row["status"] for row in gpu_parts.run_part(DRY, part)]


def test_without_a_gpu_it_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--json", str(tmp_path / "gpu.json")]) == 2
    assert "No GPU" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_without_triton_it_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    assert gpu_check.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().out


def test_every_kernel_width_and_dtype_is_a_part_of_its_own() -> None:
    parts = [*gpu_parts.Plan().parts()]
    assert len(parts) == len({*parts})
    checks = {tuple(part.split()[1:]) for part in parts if part.startswith("check ")}
    assert checks == {(k, str(w), d) for k in gpu_parts.KERNELS for w in (16, 32, 64, 128) for d in gpu_parts.DTYPES}
    assert {"agent 256", "agent 1024", "act 256", "act 1024"} < {*parts}


def test_dry_run_goes_through_every_table(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "gpu.json"
    assert gpu_check.main(["--dry-run", "--json", str(file)]) == 0
    told = capfd.readouterr().out
    assert "no GPU kernel ran" in told
    # tables come last, after a line for every part
    assert told.index("time 1,64,1,16 bfloat16") < told.index("\nkernel ") < told.index("\nagent ")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {row["part"] for row in rows} == {*DRY.parts()}
    right = [row for row in rows if row["status"] == RIGHT]
    assert {row["kernel"] for row in right if "kernel" in row} == {*gpu_parts.KERNELS}
    assert {"mlstm, torch", "slstm, torch", "torch.nn.LSTM"} <= {row.get("contender") for row in right}
    assert all(row["steps_per_s"] > 0 for row in right if row["part"].startswith(("agent", "act")))
    assert {row["status"] for row in rows} == {RIGHT, SKIPPED}


def test_wrong_kernel_is_told_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with_mlstm(monkeypatch, lambda right, q, k, v, *rest: right(q, k, v * 1.01, *rest))
    assert {*statuses("check mlstm_forward 16 float32")} == {WRONG}
    assert {*statuses("check slstm_forward 16 float32")} == {RIGHT}


def test_kernel_that_fails_in_one_length_is_told_with_the_reason_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def longer_fails(right: Any, q: Tensor, *rest: Any) -> Any:
        if q.shape[1] > 1:
            raise RuntimeError("PassManager::run failed\n   at line 3")
        return right(q, *rest)

    with_mlstm(monkeypatch, longer_fails)
    assert statuses("check mlstm_backward 16 float32") == [RIGHT, FAILED, RIGHT, FAILED]
    assert {*statuses("check mlstm_step 16 float32")} == {RIGHT}
    (row, *_) = gpu_parts.run_part(DRY, "check mlstm_forward 16 float32")
    assert row["problem"] == "RuntimeError: PassManager::run failed at line 3"


def test_backward_pass_that_fails_does_not_hide_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradient(right: Any, *given: Any) -> Any:
        hidden, state = right(*given)
        hidden.register_hook(lambda gradient: 1 / 0) if hidden.requires_grad else None
        return hidden, state

    with_mlstm(monkeypatch, without_gradient)
    assert {*statuses("check mlstm_backward 16 float32")} == {FAILED}
    assert {*statuses("check mlstm_forward 16 float32")} == {RIGHT}


def test_kernel_that_gives_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(right: Any, *given: Any) -> Any:
        hidden, state = right(*given)
        return hidden * torch.where(hidden == hidden.max(), torch.nan, 1.0), state

    with_mlstm(monkeypatch, spoilt)
    assert {*statuses("check mlstm_forward 16 float32")} == {WRONG}


def test_contender_that_fails_is_told_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(**tensors: Tensor) -> Tensor:
        raise AttributeError("no block pointers here")

    with_public_kernels(monkeypatch, kernel)
    rows = {row["contender"]: row for row in gpu_parts.run_part(DRY, "time 1,64,1,16 float32")}
    assert rows["mlstm_kernels"]["problem"] == "AttributeError: no block pointers here"
    assert {row["status"] for label, row in rows.items() if label != "mlstm_kernels"} == {RIGHT}


def test_public_kernels_are_timed_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        assert q.shape == (1, 1, 64, 16)
        assert i.shape == (1, 1, 64)
        return q * k * v * (i + f)[..., None]

    with_public_kernels(monkeypatch, kernel)
    rows = {row["contender"]: row for row in gpu_parts.run_part(DRY, "time 1,64,1,16 float32")}
    assert rows["mlstm_kernels"]["both_us"] > 0.0


def test_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert calls == ["record", "run", "record", "synchronize"]
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    assert gpu_parts._cuda_microseconds(lambda both: calls.append("run"), True) == 250.0


def test_kernels_are_checked_without_the_packages_of_agents() -> None:
    """Agents are then left out, with the name of what is missing."""
    program = """
    import sys
    ABSENT = {"sb3_contrib", "safetensors", "pydantic", "yaml", "rich", "jinja2", "filelock", "tensorboard"}

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ABSENT:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    from benchmarks import gpu_parts
    plan = gpu_parts.PLANS["dry-run"]
    for part in ("check slstm_backward 16 float32", "time 2,3,1,16 float32", "ceilings", "agent 4"):
        print(*((row["status"], row["problem"]) for row in gpu_parts.run_part(plan, part)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *kernels, agent = done.stdout.splitlines()
    assert all(line and set(line.split("'")[1::4]) == {RIGHT} for line in kernels), done.stdout
    assert "is not installed" in agent and SKIPPED in agent


# A process that does parts, light and as faulty as its parts say.
FAULTY = """
import json, os, sys, time
for line in sys.stdin:
    part = line.strip()
    if "32" in part:
        print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
        os._exit(7)
    if "128" in part:
        time.sleep(60)
    status = "WRONG" if "bfloat16" in part else "right"
    kernel, width, dtype = part.split()[1:]
    problem = "" if status == "right" else "off"
    row = dict(part=part, kernel=kernel, width=width, dtype=dtype, status=status, problem=problem, error=1e-6)
    print(json.dumps([row]), flush=True)
    if "slstm" in part and "64" in part:
        # what was done has broken the process for what comes
        os._exit(1)
"""
PARTS = [
    *("check mlstm_step 16 single", "check mlstm_step 32 single", "check mlstm_step 64 single"),
    *("check slstm_forward 64 single", "check slstm_forward 16 single", "check mlstm_step 128 single"),
    *("check mlstm_step 16 bfloat16", "check slstm_backward 16 single"),
]


@pytest.mark.parametrize("checkers", [1, 3])
def test_parts_that_end_the_process_or_hang_hide_no_other(
    checkers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "PART_SECONDS", 5.0)
    report = gpu_check.Report({"gpu": "none"}, tmp_path / "gpu.json")
    gpu_check.run_all(PARTS, [sys.executable, "-c", FAULTY], report, 60.0, checkers)
    assert report.close(dry=False) == 1
    found = {row["part"]: (row["status"], row["problem"]) for row in report.rows}
    assert [*found] == PARTS or checkers > 1 and {*found} == {*PARTS}
    assert found["check mlstm_step 32 single"] == (
        FAILED,
        "ended the process: exit code 7, CUDA error: an illegal memory access",
    )
    assert found["check mlstm_step 128 single"] == (FAILED, "took longer than 5 seconds")
    assert found["check mlstm_step 16 bfloat16"] == (WRONG, "off")
    bad = {"check mlstm_step 32 single", "check mlstm_step 128 single", "check mlstm_step 16 bfloat16"}
    assert {found[part][0] for part in PARTS if part not in bad} == {RIGHT}
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"] == report.rows
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert "3 cases are WRONG or FAILED" in capsys.readouterr().out


def test_what_is_not_reached_in_time_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = gpu_check.Report({"gpu": "none"}, tmp_path / "gpu.json")
    gpu_check.run_all(PARTS[:2], [sys.executable, "-c", FAULTY], report, 0.0)
    assert report.close(dry=False) == 2
    assert {row["status"] for row in report.rows} == {"not reached"}
    assert "2 parts were not reached in time" in capsys.readouterr().out


def test_process_that_cannot_start_is_a_failure_of_every_part(tmp_path: Path) -> None:
    report = gpu_check.Report({"gpu": "none"}, tmp_path / "gpu.json")
    gpu_check.run_all(PARTS[:2], [sys.executable, "-c", "raise ImportError('no torch here')"], report, 60.0)
    assert {row["problem"] for row in report.rows} == {"ended the process: exit code 1, ImportError: no torch here"}
