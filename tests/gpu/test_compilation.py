"""The GPU kernels compiled through their launchers, for several GPUs and without any; `make test-triton` runs it.

Needs a process of its own with TRITON_INTERPRET=0. TRITON_USAGE=file.md writes what every kernel uses as a table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "0":
    pytest.skip("compiling needs a process with TRITON_INTERPRET=0", allow_module_level=True)

import triton
import triton.language as tl

from tests.gpu import calls
from tests.gpu.compiler import KIB, TARGETS, Usage, compiling, narrow_products, usage
from xlstm_rl.kernels import triton_configs
from xlstm_rl.kernels.triton_configs import DTYPES, WIDTHS

SMALL = ("sm_86", "sm_120", "gfx942")
# Register spills of a compiler that a newer one does not need, in instructions; each costs a few cycles a step.
KNOWN_SPILLS = {("3.6", "sm_90", "slstm_backward", 128, torch.bfloat16): 6}
_rows: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if "TRITON_USAGE" in os.environ:
        header = "| GPU | launch | width | dtype | kernel | registers | shared KiB | spills | matrix instructions |"
        Path(os.environ["TRITON_USAGE"]).write_text("\n".join([header, "|---" * 9 + "|", *_rows]) + "\n")


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("kernel", calls.KERNELS)
@pytest.mark.parametrize(
    "target", [name if name not in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS]
)
def test_kernel_fits_the_chip(
    target: str, kernel: str, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_configs, "shared_memory", lambda device: TARGETS[target].shared)
    with compiling(TARGETS[target]) as compiled:
        calls.call(kernel, D, dtype)
    for used in (usage(x, TARGETS[target]) for x in compiled):
        _rows.append(_row(target, kernel, D, dtype, used))
        version = ".".join(triton.__version__.split(".")[:2])
        known = KNOWN_SPILLS.get((version, target, kernel, D, dtype), 0)
        assert used.spills <= known, used
        assert used.stack <= 8 * (known > 0), used
        assert used.shared <= TARGETS[target].shared, used
        if dtype == torch.bfloat16 and kernel != "mlstm_step":
            assert used.matrix_instructions > 0, used


def _row(target: str, kernel: str, D: int, dtype: torch.dtype, used: Usage) -> str:
    cells = (target, kernel, D, str(dtype)[6:], used.kernel, used.registers, f"{used.shared / KIB:.1f}")
    return "| " + " | ".join(map(str, (*cells, used.spills, used.matrix_instructions))) + " |"


@pytest.mark.parametrize("kernel", [name for name in calls.KERNELS if name.endswith("ward")])
def test_exponential_forget_gate_fits_the_chip(kernel: str) -> None:
    with compiling(TARGETS["sm_80"]) as compiled:
        calls.call(kernel, 32, torch.bfloat16, "exp")
    assert all(usage(x, TARGETS["sm_80"]).spills == 0 for x in compiled)


# The mLSTM's step is a kernel of its own, which `mlstm_forward` takes where T is 1.
VARIANTS = ((1, 2, 1, 0), (16, 16, 16, 0), (64, 48, 4, 0), (17, 31, 3, 1))


@pytest.mark.parametrize("kernel", calls.KERNELS)
def test_other_sizes_and_addresses_do_not_compile_again(kernel: str) -> None:
    single_step = () if kernel == "mlstm_forward" else ((2, 1, 2, 0),)
    with compiling(TARGETS["sm_80"]) as compiled:
        calls.call(kernel, 16, torch.float32)
        launches = len(compiled)
        for sizes in (*VARIANTS, *single_step):
            calls.call(kernel, 16, torch.float32, sizes=calls.Sizes(*sizes))
    assert len({id(x) for x in compiled}) == launches


@pytest.mark.parametrize("D", (16, 128))
@pytest.mark.parametrize("kernel", calls.KERNELS)
def test_no_offset_is_multiplied_in_32_bits(kernel: str, D: int) -> None:
    with compiling(TARGETS["sm_80"]) as compiled:
        calls.call(kernel, D, torch.float32)
    assert [line for x in compiled for line in narrow_products(x)] == []


@triton.jit
def _narrow(target, T, N: tl.constexpr):
    tl.store(target + tl.program_id(0) * N + tl.arange(0, N), 0.0)
    tl.store(target + tl.program_id(1) * N + T * N + tl.arange(0, N), 0.0)


def test_offsets_in_32_bits_are_found() -> None:
    with compiling(TARGETS["sm_80"]) as compiled:
        _narrow[(1,)](torch.zeros(16), 7, 16, enable_fp_fusion=True)
    assert len(narrow_products(compiled[0])) == 2
