"""Facts about the program that checks and times the GPU kernels, on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check
from xlstm_rl.kernels import dispatch

DRY = ("--dry-run", "--rounds", "1")


def without_public_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None if name == "mlstm_kernels" else find_spec(name)

    monkeypatch.setattr(gpu_check, "find_spec", find)


def with_public_kernels(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Install a package of their name whose kernels are all the given one."""
    for name in ("mlstm_kernels", "mlstm_kernels.torch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["mlstm_kernels.torch"].get_mlstm_kernel = lambda name: kernel  # type: ignore[attr-defined]


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


def test_where_no_kernel_can_run_it_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "why_not", lambda backend, tensor: "this chip is too old")
    assert gpu_check.main(DRY) == 2
    assert "No kernel can run here: this chip is too old." in capsys.readouterr().out


def test_dry_run_goes_through_every_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    without_public_kernels(monkeypatch)
    assert gpu_check.main([*DRY, "--json", str(tmp_path / "gpu.json")]) == 0
    assert "no GPU kernel ran" in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["operation"] for row in written["errors"]} == {"mlstm", "slstm"}
    assert {row["contender"] for row in written["times"]} == {"mlstm, torch", "slstm, torch", "torch.nn.LSTM"}
    assert all(0.0 < row["forward_us"] and 0.0 < row["both_us"] for row in written["times"])


def test_wrong_kernel_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = dispatch._BACKENDS["torch"]
    wrong = right._replace(mlstm=lambda q, k, v, *rest: right.mlstm(q, k, v * 1.01, *rest))
    monkeypatch.setitem(dispatch._BACKENDS, "torch", wrong)
    assert gpu_check.main([*DRY, "--json", str(tmp_path / "gpu.json")]) == 1
    assert "4 cases are WRONG" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["times"] == []


def test_public_kernels_are_timed_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        assert q.shape == (1, 1, 64, 16)
        assert i.shape == (1, 1, 64)
        return q * k * v * (i + f)[..., None]

    with_public_kernels(monkeypatch, kernel)
    found = gpu_check.contenders(gpu_check.DRY_RUN, 1, 64, 1, 16, torch.float32)
    times = gpu_check._interleaved(gpu_check.DRY_RUN, found, 1)
    assert min(times["mlstm_kernels"]) > 0.0


def test_public_kernels_that_fail_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernel(**tensors: Tensor) -> Tensor:
        raise AttributeError("no block pointers here")

    with_public_kernels(monkeypatch, kernel)
    assert "mlstm_kernels" not in gpu_check.contenders(gpu_check.DRY_RUN, 1, 64, 1, 16, torch.float32)
    assert "left out, it fails: AttributeError: no block pointers here" in capsys.readouterr().out


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
    assert gpu_check._cuda_microseconds(lambda both: calls.append("run"), True) == 250.0
