"""The GPU backend as the door sees it: when it can run, and its two entries. Triton is imported at the first launch.

The operators are imported in the entries: telling torch of them takes a twelfth of the time of an import of the agents.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState, empty_mlstm_state, empty_slstm_state
from xlstm_rl.kernels.triton_configs import DTYPES, WIDTHS, DeviceFacts, device_facts

# The oldest that is known to compile the kernels.
_OLDEST_TRITON = (3, 5)
# Builds of PyTorch bring it under other names.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")


def _installed_triton() -> tuple[int, ...] | None:
    """Major and minor version; that of a build of unknown name is taken to do."""
    if find_spec("triton") is None:
        return None
    for name in _DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            return tuple(int(part) for part in version(name).split(".")[:2])
    return _OLDEST_TRITON


_TRITON = _installed_triton()


def why_not_triton(tensor: Tensor, /) -> str | None:
    """None, or why the GPU kernels cannot compute with q [B, T, H, K] or gates [B, T, 4, H, D] like this."""
    if tensor.device.type != "cuda":
        return f"the tensor is on {tensor.device.type} and Triton needs a CUDA device"
    if _TRITON is None:
        return "the package triton is not installed"
    if _TRITON < _OLDEST_TRITON:
        return "triton {}.{} is too old, {}.{} or newer is needed".format(*_TRITON, *_OLDEST_TRITON)
    D, dtype = tensor.shape[-1], tensor.dtype
    if dtype not in DTYPES:
        return f"dtype {dtype} is not covered, only {' and '.join(map(str, DTYPES))}"
    if D not in WIDTHS:
        return f"head width {D} is not covered, only {WIDTHS}"
    device = _facts_for_trace(tensor.device)
    if device.capability < (8, 0) and not device.is_amd:
        return f"compute capability {device.capability} is below (8, 0)"
    return None


def _facts_for_trace(device: torch.device) -> DeviceFacts:
    return device_facts(device)


# A trace of torch.compile takes the answer as given; asking the driver is nothing it can trace. It is what
# `torch.compiler.assume_constant_result` does, which would import the compiler, two fifths of the time of an import.
_facts_for_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mlstm_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, MLSTMState]:
    """Fused form, arguments and results as `mlstm_sequence` with the state always in float32; differentiable once."""
    from xlstm_rl.kernels import triton_operators

    B, T, _, K = q.shape
    state = MLSTMState(*(x.float() for x in empty_mlstm_state(k, v))) if state is None else state
    if T == 0:
        return torch.zeros_like(v), state
    reset = q.new_zeros(B, T, dtype=torch.bool) if reset is None else reset
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, input_gate, forget_gate, *state[:2]))

    def run(values: Tensor, cell: Tensor) -> tuple[Tensor, MLSTMState]:
        hidden, *leaves, _ = triton_operators.mlstm(
            *(q, k, values, input_gate, forget_gate, cell, state.normalizer, state.stabilizer, reset),
            *(forget_activation, keep),
        )
        return hidden, MLSTMState(*leaves)

    return run(v, state.cell) if v.shape[-1] == K else _in_portions(run, v, state.cell, K)


def _in_portions(
    run: Callable[[Tensor, Tensor], tuple[Tensor, MLSTMState]], v: Tensor, cell: Tensor, width: int
) -> tuple[Tensor, MLSTMState]:
    """Values of any width in portions: the columns of the memory are independent but for their divisor."""
    V = v.shape[-1]
    missing = -V % width if V > 0 else width
    portions = [
        run(*columns)
        for columns in zip(*(torch.split(pad(x, (0, missing)), width, -1) for x in (v, cell)), strict=True)
    ]
    hidden = torch.cat([part for part, _ in portions], -1)[..., :V]
    cell = torch.cat([last.cell for _, last in portions], -1)[..., :V].contiguous()
    return hidden, portions[0][1]._replace(cell=cell)


def slstm_fused(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, SLSTMState]:
    """Fused form, arguments and results as `slstm_sequence` with the state always in float32; differentiable once."""
    from xlstm_rl.kernels import triton_operators

    B, T = gates.shape[:2]
    state = SLSTMState(*(x.float() for x in empty_slstm_state(gates))) if state is None else state
    if T == 0:
        return torch.zeros_like(gates[:, :, 0]), state
    reset = gates.new_zeros(B, T, dtype=torch.bool) if reset is None else reset
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (gates, recurrent, *state[:3]))
    hidden, *leaves, _ = triton_operators.slstm(gates, recurrent, *state, reset, forget_activation, keep)
    return hidden, SLSTMState(*leaves)
