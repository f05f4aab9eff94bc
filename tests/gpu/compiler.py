"""Compiles what the launchers ask for, for any GPU and without one, and reads what the machine code uses."""

from __future__ import annotations

import contextlib
import gc
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface

KIB = 1024
# For the kernels of one launch; they take two to ten on one core.
SECONDS = 120


class Target(NamedTuple):
    """A GPU to compile for, and the bytes of shared memory that one program may have there."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


class Usage(NamedTuple):
    """What one compiled kernel uses."""

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    matrix_instructions: int


class Driver:
    """Answers which GPU is there, and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: Target) -> Iterator[list[Any]]:
    """Inside, `kernel[grid](...)` compiles for the target instead of running; yields the compiled kernels."""
    compiled: list[Any] = []

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *arguments, **options: compiled.append(kernel.warmup(*arguments, grid=grid, **options))

    # The cache of each kernel knows devices by number only.
    for function in [x for x in gc.get_objects() if type(x) is JITFunction]:
        function.device_caches.clear()
    slow = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    hip = "6.0" if target.gpu.backend == "hip" else None
    with (
        patch.object(driver, "_active", Driver(target.gpu)),
        patch.object(KernelInterface, "__getitem__", launch),
        patch.object(torch.version, "hip", hip),
    ):
        try:
            yield compiled
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, slow)


def _too_slow(number: int, frame: Any) -> None:
    raise TimeoutError(f"a launch did not compile within {SECONDS} seconds")


def usage(kernel: Any, target: Target) -> Usage:
    """Read the resources of a compiled kernel."""
    read = _amd if target.gpu.backend == "hip" else _nvidia
    return Usage(
        kernel.metadata.name, *read(kernel), shared=kernel.metadata.shared, matrix_instructions=_matrix(kernel)
    )


def narrow_products(kernel: Any) -> list[str]:
    """Multiplications in 32 bits of what may be large, as lines of the kernel's intermediate code.

    Small are constants, positions in a tile, programs of the second and third dimension of the grid, quotients,
    remainders, and what is made of or counted up to these alone. Arguments, rows of the batch and time are not.
    """
    small: set[str] = set()
    found = []
    for line in kernel.asm["ttir"].splitlines():
        loop = re.search(r"scf\.for (%\w+ = %\w+ to %\w+)", line)
        target, *operands = re.findall(r"%[\w#]+", loop[1] if loop else line) or [""]
        if re.search(r"arith\.muli.* : (?:i32|tensor<[\dx]+xi32>)", line) and not small.issuperset(operands):
            found.append(line.strip())
        is_source = re.search(r"tt\.(?:func|load|get_num_programs|get_program_id x)", line)
        is_bounded = re.search(r"arith\.(?:div|rem)[su]i", line)
        if is_bounded or (not is_source and small.issuperset(operands)):
            small.add(target)
        else:
            small.discard(target)
    return found


def _matrix(kernel: Any) -> int:
    text = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    return len(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|\bv_mfma|\bv_wmma", text))


def _nvidia(kernel: Any) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _run(knobs.nvidia.cuobjdump.path, "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert found is not None, resources
    return int(found[1]), int(found[2]), len(re.findall(r"\b(?:LDL|STL)\b", code))


def _amd(kernel: Any) -> tuple[int, int, int]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return field("vgpr_count"), field("private_segment_fixed_size"), field("vgpr_spill_count")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
