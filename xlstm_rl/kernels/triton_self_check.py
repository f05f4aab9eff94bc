"""The GPU kernels compared with the torch forms on the GPU at hand, once per operation, head width and dtype.

They were compiled and emulated, and have never run on a GPU: until they have, "auto" does not take them on trust.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xlstm_rl.kernels.mlstm_chunkwise import mlstm_chunkwise
from xlstm_rl.kernels.slstm_scan import slstm_scan
from xlstm_rl.kernels.states import MLSTMState, SLSTMState
from xlstm_rl.kernels.tracing import is_plain
from xlstm_rl.kernels.triton_backend import mlstm_fused, slstm_fused

# Largest difference relative to the largest value of a tensor: above rounding, below any mistake.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
B, H = 2, 2
# A single step has a kernel of its own; 20 steps are a chunk and a part of the next.
LENGTHS = (1, 20)

Kernel = Callable[..., tuple[Tensor, Any]]


def why_not_trusted(tensor: Tensor, /) -> str | None:
    """None, or how the GPU kernels failed on tensors like q [B, T, H, K] or gates [B, T, 4, H, D] on this GPU.

    The first question of a kind takes the time of compiling the kernels, which their use would take too. What is traced
    or recorded is not interrupted for it and gets None.
    """
    if (
        not is_plain(tensor)
        or not tensor.is_cuda
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    ):
        return None
    return _checked("mlstm" if tensor.ndim == 4 else "slstm", tensor.shape[-1], tensor.dtype, tensor.device)


@cache
def _checked(operation: str, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    fused: Kernel = mlstm_fused if operation == "mlstm" else slstm_fused
    expected: Kernel = mlstm_chunkwise if operation == "mlstm" else slstm_scan
    wrong = difference(fused, expected, operation, width, dtype, device)
    if wrong is None:
        return None
    return f"its {operation} of width {width} in {dtype} fails here ({wrong}); see `python -m benchmarks.gpu_check`"


def difference(
    kernel: Kernel, expected: Kernel, operation: str, width: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What two kernels disagree in, values or gradients, or how the first one fails; None if they agree.

    Args:
        kernel: computes in `dtype`.
        expected: computes in float32.
        operation: "mlstm" or "slstm".
        width: of the heads.
        dtype: of the inputs.
        device: of all tensors.
    """
    for T in LENGTHS:
        inputs, reset = _inputs(operation, T, width, dtype, device)
        try:
            found = _run(kernel, inputs, reset, dtype)
        # a kernel that was never run may fail in any way
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for name, value in _run(expected, inputs, reset, torch.float32).items():
            distance = float((found[name].float() - value).abs().max() / value.abs().max().clamp(min=1e-3))
            # not the other way round: NaN must fail
            if not distance <= ALLOWED[dtype]:
                return f"{name} off by {distance:.1e} after {T} steps"
    return None


def _inputs(
    operation: str, T: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and state by name, rounded to `dtype` where the kernels read them so; and resets."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, rounded: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values.to(dtype).float() if rounded else values).to(device)

    if operation == "mlstm":
        inputs = {name: draw(B, T, H, width) for name in "qkv"}
        inputs |= {"input_gate": draw(B, T, H), "forget_gate": draw(B, T, H) + 2}
        shapes = zip(MLSTMState._fields, ((B, H, width, width), (B, H, width), (B, H)), strict=True)
    else:
        inputs = {"gates": draw(B, T, 4, H, width), "recurrent": draw(4, H, width, width) / width**0.5}
        inputs["recurrent"] = inputs["recurrent"].to(dtype).float()
        shapes = zip(SLSTMState._fields, ((B, H, width),) * 4, strict=True)
    state = {name: draw(*shape, rounded=False) for name, shape in shapes}
    state["normalizer"] = state["normalizer"].abs() + 1
    state["stabilizer"] = state["stabilizer"].abs()
    return inputs | state, (torch.rand(B, T, generator=generator) < 0.15).to(device)


def _run(kernel: Kernel, inputs: dict[str, Tensor], reset: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden, final state and the gradients by all inputs, by name."""
    state_type: Any = MLSTMState if "q" in inputs else SLSTMState
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {
            name: value.clone().to(torch.float32 if name in state_type._fields else dtype).requires_grad_()
            for name, value in inputs.items()
        }
        state = state_type(*(leaves[name] for name in state_type._fields))
        arguments = [leaf for name, leaf in leaves.items() if name not in state_type._fields]
        hidden, final = kernel(*arguments, state._replace(stabilizer=state.stabilizer.detach()), reset, "sigmoid")
        results = {"hidden": hidden, **{f"final {name}": leaf for name, leaf in final._asdict().items()}}
        parts = [leaf.float() for name, leaf in results.items() if leaf.requires_grad]
        weighted = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part).to(part)).sum() for part in parts)
        sources = {name: leaf for name, leaf in leaves.items() if name != "stabilizer"}
        gradients = torch.autograd.grad(weighted, list(sources.values()))
    results |= {f"gradient by {name}": part for name, part in zip(sources, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}
