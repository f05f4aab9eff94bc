"""The compiled CPU kernels: loading the build for this machine, and why they cannot run where they cannot."""

import ctypes
import functools
import importlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xlstm_rl.kernels.recording import recording
from xlstm_rl.kernels.tracing import differentiated_forwards, is_plain, traced

SWITCH = "XLSTM_RL_NATIVE"
# What the module calls the order of its arguments; a build of other sources has another number.
INTERFACE = 7
_DTYPES = (torch.float32, torch.float64)


class Extension(NamedTuple):
    """The compiled module, or why there is none."""

    module: ModuleType | None
    why_not: str | None


@functools.cache
def extension() -> Extension:
    """Load the build for this machine; without any, warn once that the torch forms serve."""
    if os.environ.get(SWITCH) == "0":
        return Extension(None, f"{SWITCH}=0 switches the compiled kernels off")
    reason = "the compiled kernels were not built"
    for name in _builds():
        try:
            module = importlib.import_module(f"xlstm_rl.kernels._cpp_{name}")
        except ImportError:
            continue
        if module.INTERFACE != INTERFACE:
            reason = "the compiled kernels were built from other sources"
            continue
        _use_threads_of_torch(module)
        use_tensors(module)
        return Extension(module, None)
    return _missing(reason)


def why_not_now() -> str | None:
    """Why the compiled kernels cannot compute here and now, whatever the tensors, or None if they can."""
    if traced():
        return "the compiled kernels cannot be traced, compiled or transformed by torch.func"
    if differentiated_forwards():
        return "the compiled kernels have no forward-mode derivatives"
    if recording():
        return "calls of the kernels are recorded, and the compiled blocks do without them"
    return None


def why_not(tensor: Tensor) -> str | None:
    """Why the compiled kernels cannot compute with tensors like this one, or None if they can."""
    reason = why_not_now()
    if reason is not None:
        return reason
    if not is_plain(tensor):
        return f"the compiled kernels take plain tensors, not {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"the compiled kernels run on the CPU, not on {tensor.device.type}"
    if tensor.dtype not in _DTYPES:
        return f"the compiled kernels take float32 and float64, not {tensor.dtype}"
    return extension().why_not


def why_not_all(tensors: Iterable[Tensor]) -> str | None:
    """Why the compiled kernels cannot read tensors, of whatever shape and dtype, or None if they can."""
    for tensor in tensors:
        if not is_plain(tensor):
            return f"the compiled kernels take plain tensors, not {type(tensor).__name__}"
    return None


def readable(tensor: Tensor) -> bool:
    """Whether a tensor is plain, its memory is that of the CPU, and there, and holds its numbers as they are."""
    return (
        is_plain(tensor)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def compiled() -> ModuleType:
    """The compiled module; ask `why_not` first."""
    module = extension().module
    assert module is not None
    return module


def _builds() -> list[str]:
    """Names of the builds that the machine can run, fastest first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith(("AVX512", "AVX10")):
        return ["avx512", "avx2", "base"]
    return ["avx2", "base"] if capability == "AVX2" else ["base"]


def _how_to_build(system: str = os.name) -> str:
    """Advice for a kind of operating system, as `os.name` tells it."""
    if system == "nt":
        return "work in the Windows Subsystem for Linux: MSVC cannot compile them"
    return (
        "install a C++ compiler (g++ or clang) and then xlstm_rl again, or in a checkout run "
        "`python setup.py build_ext --inplace`"
    )


def _missing(reason: str) -> Extension:
    warnings.warn(
        f"{reason}: the torch forms serve, which are 2 to 5 times slower on CPUs. For the fast ones, "
        f"{_how_to_build()}; {SWITCH}=0 silences this.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Extension(None, f"{reason}; {_how_to_build()}")


def use_tensors(module: ModuleType, *, exchange: bool = True) -> bool:
    """Let the module read tensors: where torch has it, through its table for DLPack, unless `exchange` is false.

    Returns:
        Whether that table is used and not the methods of tensors, which take some microseconds more per step.
    """
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None) if exchange else None
    used: bool = module.use_tensors(Tensor, nn.Parameter, torch.float32, torch.float64, torch.bool, table)
    return used


def _use_threads_of_torch(module: ModuleType) -> None:
    """Let the module run on torch's threads where torch exports them; elsewhere it runs on one."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    for library in libraries:
        try:
            pool = ctypes.CDLL(str(library)).torch_parallel_for
        except (OSError, AttributeError):
            continue
        module.use_pool(ctypes.cast(pool, ctypes.c_void_p).value)
