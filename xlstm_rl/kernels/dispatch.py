"""The one door to the kernels: a name per operation, and behind it the backends that can compute it."""

import warnings
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from xlstm_rl.kernels import cpp_extension
from xlstm_rl.kernels.argument_checks import check_mlstm, check_slstm, resolved
from xlstm_rl.kernels.cpp_sequence import mlstm_cpp, slstm_cpp
from xlstm_rl.kernels.mlstm_chunkwise import mlstm_chunkwise
from xlstm_rl.kernels.mlstm_reference import mlstm_recurrence
from xlstm_rl.kernels.recording import MLSTMCall, SLSTMCall, record, recording
from xlstm_rl.kernels.slstm_reference import slstm_recurrence
from xlstm_rl.kernels.slstm_scan import slstm_scan
from xlstm_rl.kernels.spoilt import MLSTMKernel, SLSTMKernel, contain_mlstm, contain_slstm
from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState, empty_mlstm_state, empty_slstm_state
from xlstm_rl.kernels.triton_backend import mlstm_fused, slstm_fused, why_not_triton
from xlstm_rl.kernels.triton_self_check import why_not_trusted


def mlstm_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None = None,
    reset: Tensor | None = None,
    *,
    forget_activation: ForgetActivation = "sigmoid",
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """Run a matrix-memory LSTM over a sequence (Beck et al. 2024, eq. 19-27).

    Keys are scaled by 1 / sqrt(K) here. The output is `C q / max(|n . q|, exp(-min(m, 60)))` with
    `m = max(log f + m, i, 0)`, without output gate or norm.

    Args:
        q: [B, T, H, K], float32 or float64 like all the others, or bfloat16 on a GPU (then with float32 states);
            T may be zero or one.
        k: [B, T, H, K].
        v: [B, T, H, V].
        input_gate: [B, T, H], before its exponential activation.
        forget_gate: [B, T, H], before activation.
        state: memory before the first step; None or zeros is the empty memory.
        reset: [B, T] bool or None, true where the memory of a row is emptied before the step.
        forget_activation: what turns the forget gate into a factor.
        backend: "auto", or one of `backends()`, which then never falls back.

    Returns:
        Hidden [B, T, H, V] and the state after the last step. All but the stabilizers and `reset` carry gradients.

    Raises:
        ValueError: if shapes do not fit together, or the backend is unknown or cannot run here.
        TypeError: if a dtype is not allowed.
    """
    run = _choose(backend, q, (k, v, input_gate, forget_gate, *(state or ()))).mlstm
    check_mlstm(q, k, v, input_gate, forget_gate, state, reset, forget_activation)
    q, k, v, input_gate, forget_gate = map(resolved, (q, k, v, input_gate, forget_gate))
    state = None if state is None else MLSTMState(*map(resolved, state))
    hidden, final = contain_mlstm(run, q, k, v, input_gate, forget_gate, state, reset, forget_activation)
    if recording():
        before = empty_mlstm_state(k, v) if state is None else state
        record(MLSTMCall(q, k, v, input_gate, forget_gate, before, reset, forget_activation, hidden, final))
    return hidden, final


def slstm_sequence(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None = None,
    reset: Tensor | None = None,
    *,
    forget_activation: ForgetActivation = "sigmoid",
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """Run a scalar-memory LSTM with memory mixing over a sequence (Beck et al. 2024, eq. 8-18).

    Gate `a` of step t sees `gates[:, t, a] + recurrent[a] @ hidden[:, t - 1]`, head by head.

    Args:
        gates: [B, T, 4, H, D], float32 or float64, or bfloat16 on a GPU (then with float32 states), pre-activations of
            i, f, z, o with bias; T may be zero or one.
        recurrent: [4, H, D, D], recurrent weights as (out, in), the same dtype.
        state: memory before the first step; None or zeros is the empty memory.
        reset: [B, T] bool or None, true where the memory of a row is emptied before the step.
        forget_activation: what turns the forget gate into a factor.
        backend: "auto", or one of `backends()`, which then never falls back.

    Returns:
        Hidden [B, T, H, D] and the state after the last step. All but the stabilizers and `reset` carry gradients.

    Raises:
        ValueError: if shapes do not fit together, or the backend is unknown or cannot run here.
        TypeError: if a dtype is not allowed.
    """
    run = _choose(backend, gates, (recurrent, *(state or ()))).slstm
    check_slstm(gates, recurrent, state, reset, forget_activation)
    gates, recurrent = resolved(gates), resolved(recurrent)
    state = None if state is None else SLSTMState(*map(resolved, state))
    hidden, final = contain_slstm(run, gates, recurrent, state, reset, forget_activation)
    if recording():
        before = empty_slstm_state(gates) if state is None else state
        record(SLSTMCall(gates, recurrent, before, reset, forget_activation, hidden, final))
    return hidden, final


class WhyNot(Protocol):
    """Tells whether a backend can compute with a tensor."""

    def __call__(self, tensor: Tensor, /) -> str | None:
        """None, or the reason why it cannot."""


class WhyNotAll(Protocol):
    """Tells whether a backend can read tensors of a shape, dtype and device that it takes."""

    def __call__(self, tensors: Iterable[Tensor], /) -> str | None:
        """None, or the reason why it cannot."""


class Backend(NamedTuple):
    """One way to compute all the operations.

    Attributes:
        mlstm: behind `mlstm_sequence`.
        slstm: behind `slstm_sequence`.
        why_not: None or a reason, asked on every call with q or gates: it must be quick.
        why_not_trusted: the same for "auto" alone, which does not take what could run and was found to be wrong.
        why_not_all: asked on every call with all the other tensors but `reset`.
    """

    mlstm: MLSTMKernel
    slstm: SLSTMKernel
    why_not: WhyNot
    why_not_trusted: WhyNot = lambda tensor, /: None
    why_not_all: WhyNotAll = lambda tensors, /: None


class BackendInfo(NamedTuple):
    """Which backend computes on a device.

    Attributes:
        in_use: name of the one that "auto" takes for float32.
        unusable: reason by name of those that cannot run there.
    """

    in_use: str
    unusable: dict[str, str]


def _why_not_torch(tensor: Tensor, /) -> str | None:
    if tensor.dtype == torch.bfloat16:
        return "it computes in the dtype of its arguments, and bfloat16 is too coarse for that"
    return None


# "auto" takes the first that can run; the reference comes last and is there to be compared with.
_BACKENDS: dict[str, Backend] = {
    "triton": Backend(mlstm_fused, slstm_fused, why_not_triton, why_not_trusted),
    "cpp": Backend(mlstm_cpp, slstm_cpp, cpp_extension.why_not, why_not_all=cpp_extension.why_not_all),
    "torch": Backend(mlstm_chunkwise, slstm_scan, _why_not_torch),
    "reference": Backend(mlstm_recurrence, slstm_recurrence, _why_not_torch),
}


def backends() -> tuple[str, ...]:
    """Names of all backends, in the order in which "auto" tries them."""
    return tuple(_BACKENDS)


def why_not(backend: str, tensor: Tensor) -> str | None:
    """Why a backend cannot compute with tensors like this one (q or gates), or None if it can.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; allowed is 'auto' or one of {backends()}")
    return _BACKENDS[backend].why_not(tensor)


def backend_info() -> dict[str, BackendInfo]:
    """Backend in use by device type, for the devices of this machine."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: _info(torch.empty(1, 1, 1, 16, device=device)) for device in devices}


def _info(tensor: Tensor) -> BackendInfo:
    reasons = {name: backend.why_not(tensor) or backend.why_not_trusted(tensor) for name, backend in _BACKENDS.items()}
    in_use = next(name for name, reason in reasons.items() if reason is None)
    return BackendInfo(in_use, {name: reason for name, reason in reasons.items() if reason is not None})


def _choose(name: str, tensor: Tensor, others: tuple[Tensor, ...] = ()) -> Backend:
    if name == "auto":
        return _first_that_can(tensor, others)
    reason = why_not(name, tensor)
    if reason is not None:
        usable = tuple(other for other, backend in _BACKENDS.items() if backend.why_not(tensor) is None)
        raise ValueError(f"backend {name!r} cannot run here: {reason}; use backend='auto' or one of {usable}")
    reason = _BACKENDS[name].why_not_all(others)
    if reason is not None:
        raise TypeError(f"backend {name!r} cannot run here: {reason}; use backend='auto' or 'torch'")
    return _BACKENDS[name]


def _first_that_can(tensor: Tensor, others: tuple[Tensor, ...]) -> Backend:
    reasons: dict[str, str] = {}
    for name, backend in _BACKENDS.items():
        reason = backend.why_not(tensor) or backend.why_not_trusted(tensor) or backend.why_not_all(others)
        if reason is None:
            if tensor.is_cuda and "triton" in reasons and not torch.compiler.is_compiling():
                _warn_once(name, reasons["triton"])
            return backend
        reasons[name] = reason
    raise TypeError(
        f"no backend computes in {tensor.dtype} here, allowed are torch.float32 and torch.float64: "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    )


@cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"backend 'triton' is not used here: {reason}; using {name!r}", RuntimeWarning, stacklevel=5)
