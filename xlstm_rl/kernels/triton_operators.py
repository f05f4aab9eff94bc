"""The GPU kernels as operators of torch, with shapes for tracing and with gradients, for `torch.compile` too.

    xlstm_rl::mlstm, xlstm_rl::mlstm_backward, xlstm_rl::slstm, xlstm_rl::slstm_backward

They compute on CUDA tensors only. The state is float32; reset is bool [B, T]; T is at least 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xlstm_rl.kernels.states import MLSTMState, SLSTMState
from xlstm_rl.kernels.triton_arguments import MLSTMInputs, MLSTMMemory, MLSTMSaved, SLSTMInputs, SLSTMMemory, SLSTMSaved
from xlstm_rl.kernels.triton_configs import slstm_trace_fields

_NAMESPACE = "xlstm_rl"
_library = torch.library.Library(_NAMESPACE, "DEF")
_library.define(
    "mlstm(Tensor q, Tensor k, Tensor v, Tensor input_gate, Tensor forget_gate, Tensor cell, Tensor normalizer, "
    "Tensor stabilizer, Tensor reset, str forget_activation, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "mlstm_backward(Tensor d_hidden, Tensor d_cell, Tensor d_normalizer, Tensor q, Tensor k, Tensor v, "
    "Tensor input_gate, Tensor forget_gate, Tensor cell, Tensor normalizer, Tensor stabilizer, Tensor reset, "
    "Tensor hidden, Tensor last_cell, Tensor last_normalizer, Tensor trace, str forget_activation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "slstm(Tensor gates, Tensor recurrent, Tensor cell, Tensor normalizer, Tensor hidden, Tensor stabilizer, "
    "Tensor reset, str forget_activation, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "slstm_backward(Tensor d_output, Tensor d_cell, Tensor d_normalizer, Tensor d_hidden, Tensor gates, "
    "Tensor recurrent, Tensor cell, Tensor normalizer, Tensor hidden, Tensor stabilizer, Tensor reset, "
    "Tensor output, Tensor trace, str forget_activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def mlstm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden [B, T, H, D], the three leaves of the final state and what the backward pass needs (if `keep`)."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.xlstm_rl.mlstm(*arguments)
    return result


def slstm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden [B, T, H, D], the four leaves of the final state and what the backward pass needs (if `keep`)."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.xlstm_rl.slstm(*arguments)
    return result


def launch_mlstm(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the mLSTM kernel."""
    from xlstm_rl.kernels import mlstm_triton

    *tensors, activation, keep = _as_kernels_want(arguments)
    hidden, last, trace = mlstm_triton.forward(*_mlstm_arguments(tensors), activation, keep)
    return hidden, *last, trace


def launch_mlstm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the backward kernels of the mLSTM."""
    from xlstm_rl.kernels import mlstm_triton_backward

    d_hidden, d_cell, d_normalizer, *tensors, activation = _as_kernels_want(arguments)
    *tensors, hidden, cell, normalizer, trace = tensors
    saved = MLSTMSaved(hidden, MLSTMMemory(cell, normalizer), trace)
    d_last = MLSTMMemory(d_cell, d_normalizer)
    return mlstm_triton_backward.backward(d_hidden, d_last, *_mlstm_arguments(tensors), saved, activation)


def launch_slstm(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the sLSTM kernel."""
    from xlstm_rl.kernels import slstm_triton

    *tensors, activation, keep = _as_kernels_want(arguments)
    output, last, trace = slstm_triton.forward(*_slstm_arguments(tensors), activation, keep)
    return output, *last, trace


def launch_slstm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the backward kernel of the sLSTM."""
    from xlstm_rl.kernels import slstm_triton_backward

    d_output, d_cell, d_normalizer, d_hidden, *tensors, output, trace, activation = _as_kernels_want(arguments)
    saved, d_last = SLSTMSaved(output, trace), SLSTMMemory(d_cell, d_normalizer, d_hidden)
    return slstm_triton_backward.backward(d_output, d_last, *_slstm_arguments(tensors), saved, activation)


def _as_kernels_want(arguments: Sequence[Any]) -> list[Any]:
    """Contiguous, and at addresses that are multiples of 16: for other ones Triton would compile once more."""
    return [_aligned(x.contiguous()) if isinstance(x, Tensor) else x for x in arguments]


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % 16 else x


def _mlstm_arguments(tensors: Sequence[Any]) -> tuple[MLSTMInputs, MLSTMState]:
    """Group the tensors, which come in the order of the operator."""
    q, k, v, input_gate, forget_gate, *state, reset = tensors
    return MLSTMInputs(q, k, v, input_gate, forget_gate, reset), MLSTMState(*state)


def _slstm_arguments(tensors: Sequence[Any]) -> tuple[SLSTMInputs, SLSTMState]:
    """Group the tensors, which come in the order of the operator."""
    gates, recurrent, *state, reset = tensors
    return SLSTMInputs(gates, recurrent, reset), SLSTMState(*state)


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes, as the kernels write them."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _mlstm_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, keep = arguments
    inputs, state = _mlstm_arguments(tensors)
    B, T, H, _ = inputs.q.shape
    return *_empty_like(inputs.v, *state), state.stabilizer.new_empty(2, B, T if keep else 0, H)


def _mlstm_backward_shapes(
    d_hidden: Tensor, d_cell: Tensor, d_normalizer: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _empty_like(*arguments[:7])


def _slstm_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, keep = arguments
    inputs, state = _slstm_arguments(tensors)
    B, T, _, H, D = inputs.gates.shape
    trace = state.cell.new_empty(slstm_trace_fields(inputs.gates), B, T if keep else 0, H, D)
    return inputs.gates.new_empty(B, T, H, D), *_empty_like(*state), trace


def _slstm_backward_shapes(
    d_output: Tensor, d_cell: Tensor, d_normalizer: Tensor, d_hidden: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _empty_like(*arguments[:5])


def _save_mlstm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-2], *output[:3], output[-1])
    ctx.forget_activation = inputs[-2]
    ctx.mark_non_differentiable(*output[-2:])


def _differentiate_mlstm(
    ctx: Any, d_hidden: Tensor, d_cell: Tensor, d_normalizer: Tensor, d_stabilizer: Tensor, d_trace: Tensor
) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.xlstm_rl.mlstm_backward(
        d_hidden, d_cell, d_normalizer, *ctx.saved_tensors, ctx.forget_activation
    )
    return (*gradients, None, None, None, None)


def _save_slstm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-2], output[0], output[-1])
    ctx.forget_activation = inputs[-2]
    ctx.mark_non_differentiable(*output[-2:])


def _differentiate_slstm(
    ctx: Any,
    d_output: Tensor,
    d_cell: Tensor,
    d_normalizer: Tensor,
    d_hidden: Tensor,
    d_stabilizer: Tensor,
    d_trace: Tensor,
) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.xlstm_rl.slstm_backward(
        d_output, d_cell, d_normalizer, d_hidden, *ctx.saved_tensors, ctx.forget_activation
    )
    return (*gradients, None, None, None, None)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("the GPU kernels cannot be differentiated twice; use backend='reference' for create_graph")


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


_LAUNCHES = {
    "mlstm": launch_mlstm,
    "mlstm_backward": launch_mlstm_backward,
    "slstm": launch_slstm,
    "slstm_backward": launch_slstm_backward,
}
_SHAPES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "mlstm": _mlstm_shapes,
    "mlstm_backward": _mlstm_backward_shapes,
    "slstm": _slstm_shapes,
    "slstm_backward": _slstm_backward_shapes,
}
for _name, _launch in _LAUNCHES.items():
    _library.impl(_name, _launch, "CUDA")
    torch.library.register_fake(f"{_NAMESPACE}::{_name}", _SHAPES[_name], lib=_library)
for _name, _differentiate, _save in (
    ("mlstm", _differentiate_mlstm, _save_mlstm),
    ("slstm", _differentiate_slstm, _save_slstm),
    ("mlstm_backward", _refuse, _save_nothing),
    ("slstm_backward", _refuse, _save_nothing),
):
    torch.library.register_autograd(f"{_NAMESPACE}::{_name}", _differentiate, setup_context=_save, lib=_library)
