"""The compiled sequence kernels: arguments as pointers, and the autograd functions around them."""

from typing import Any

import torch
from torch import Tensor

from xlstm_rl.kernels.cpp_extension import compiled, readable
from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState, empty_mlstm_state, empty_slstm_state


def mlstm_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: MLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, MLSTMState]:
    """Compiled chunkwise form, arguments and results as `mlstm_sequence`; differentiable once."""
    state = empty_mlstm_state(k, v) if state is None else state
    if q.shape[1] == 0:
        return torch.zeros_like(v), state
    inputs = (q, k, v, input_gate, forget_gate, *state)
    _check_readable(inputs, reset)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:-1]):
        hidden, *leaves = _MLSTM.apply(*inputs[:-1], state.stabilizer.detach(), reset, forget_activation)  # type: ignore[no-untyped-call]
        return hidden, MLSTMState(*leaves)
    return _mlstm_forward(inputs, reset, forget_activation, None)


def slstm_cpp(
    gates: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    reset: Tensor | None,
    forget_activation: ForgetActivation,
) -> tuple[Tensor, SLSTMState]:
    """Compiled scan, arguments and results as `slstm_sequence`; differentiable once."""
    state = empty_slstm_state(gates) if state is None else state
    if gates.shape[1] == 0:
        return torch.zeros_like(gates[:, :, 0]), state
    inputs = (gates, recurrent, *state)
    _check_readable(inputs, reset)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:-1]):
        hidden, *leaves = _SLSTM.apply(*inputs[:-1], state.stabilizer.detach(), reset, forget_activation)  # type: ignore[no-untyped-call]
        return hidden, SLSTMState(*leaves)
    return _slstm_forward(inputs, reset, forget_activation, None)


def _check_readable(inputs: tuple[Tensor, ...], reset: Tensor | None) -> None:
    for x in inputs if reset is None else (*inputs, reset):
        if not readable(x):
            raise TypeError(
                f"the compiled kernels take plain tensors that have memory, not a {type(x).__name__} of shape "
                f"{tuple(x.shape)} without or of another kind; pass backend='torch'"
            )


def pointer(x: Tensor | None) -> int:
    """Address of the first element; zero for None."""
    return 0 if x is None else x.data_ptr()


def _readable(x: Tensor) -> Tensor:
    """The tensor with a dense last dimension; a copy only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """The tensor with all dimensions in order, if there is one."""
    return None if x is None else x.contiguous()


def _mlstm_sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.element_size(), *q.shape, v.shape[3]


def _mlstm_forward(
    inputs: tuple[Tensor, ...], reset: Tensor | None, forget_activation: ForgetActivation, trace: Tensor | None
) -> tuple[Tensor, MLSTMState]:
    # q, k, v and gates come as views of one projection: they are read where they lie, by strides. Only the last
    # dimension of the former must be dense, as vectors are loaded along it. The state is small, and copied where it is
    # not in order. These names keep the tensors alive until the call is over, which has addresses alone.
    q, k, v = (_readable(x) for x in inputs[:3])
    input_gate, forget_gate = inputs[3:5]
    cell, normalizer, stabilizer = (x.contiguous() for x in inputs[5:])
    reset = dense(reset)
    hidden = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = MLSTMState(torch.empty_like(cell), torch.empty_like(normalizer), torch.empty_like(stabilizer))
    # the order is that of `Call::mlstm` in cpp/module.cpp: sizes, then each tensor's address and strides
    compiled().mlstm_forward(
        *_mlstm_sizes(q, v),
        *(q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3]),
        *(input_gate.data_ptr(), *input_gate.stride(), forget_gate.data_ptr(), *forget_gate.stride()),
        *(pointer(reset), forget_activation == "exp"),
        *(cell.data_ptr(), normalizer.data_ptr(), stabilizer.data_ptr()),
        *(hidden.data_ptr(), final.cell.data_ptr(), final.normalizer.data_ptr(), final.stabilizer.data_ptr()),
        *(pointer(trace), torch.get_num_threads()),
    )
    return hidden, final


class _MLSTM(torch.autograd.Function):
    """The chunkwise form with its backward pass; the stabilizer is a constant there, as it cancels exactly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run forward and keep the memory before every chunk."""
        *inputs, reset, forget_activation = arguments
        q, _, v = inputs[:3]
        trace = q.new_empty(compiled().mlstm_trace_size(*_mlstm_sizes(q, v)))
        hidden, final = _mlstm_forward(tuple(inputs), reset, forget_activation, trace)
        ctx.save_for_backward(*inputs[:5], reset, hidden, trace)
        ctx.forget_activation = forget_activation
        ctx.mark_non_differentiable(final.stabilizer)
        return hidden, *final

    @staticmethod
    def backward(
        ctx: Any, d_hidden: Tensor, d_cell: Tensor, d_normalizer: Tensor, d_stabilizer: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the forward arguments."""
        refuse_second_derivative("mLSTM")
        *inputs, input_gate, forget_gate, reset, hidden, trace = ctx.saved_tensors
        q, k, v = (_readable(x) for x in inputs)
        reset = dense(reset)
        outer = (d_hidden.contiguous(), d_cell.contiguous(), d_normalizer.contiguous())
        gradients = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (q, k, v, input_gate, forget_gate, d_cell, d_normalizer)
        ]
        compiled().mlstm_backward(
            *_mlstm_sizes(q, v),
            *(q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3]),
            *(input_gate.data_ptr(), *input_gate.stride(), forget_gate.data_ptr(), *forget_gate.stride()),
            # The state before the sequence is not read: the trace begins with it.
            *(pointer(reset), ctx.forget_activation == "exp", 0, 0, 0),
            *(hidden.data_ptr(), trace.data_ptr()),
            *(x.data_ptr() for x in (*outer, *gradients)),
            torch.get_num_threads(),
        )
        return *gradients, None, None, None


def _slstm_sizes(gates: Tensor) -> tuple[int, ...]:
    B, T, _, H, D = gates.shape
    return gates.element_size(), B, T, H, D


def _slstm_forward(
    inputs: tuple[Tensor, ...], reset: Tensor | None, forget_activation: ForgetActivation, trace: Tensor | None
) -> tuple[Tensor, SLSTMState]:
    # The gates, the largest tensor here, are read where they lie, by four strides; all else is in order.
    gates = _readable(inputs[0])
    recurrent, *state = (x.contiguous() for x in inputs[1:])
    reset = dense(reset)
    B, T, _, H, D = gates.shape
    output = gates.new_empty(B, T, H, D)
    final = SLSTMState(*(torch.empty_like(x) for x in state))
    compiled().slstm_forward(
        *(*_slstm_sizes(gates), gates.data_ptr(), *gates.stride()[:4], recurrent.data_ptr()),
        *(pointer(reset), forget_activation == "exp", *(x.data_ptr() for x in state)),
        *(output.data_ptr(), *(x.data_ptr() for x in final)),
        *(pointer(trace), torch.get_num_threads()),
    )
    return output, final


class _SLSTM(torch.autograd.Function):
    """The scan with its backward pass through time; the stabilizer is a constant there, as it cancels exactly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run forward and keep what each step did."""
        *inputs, reset, forget_activation = arguments
        trace = inputs[0].new_empty(compiled().slstm_trace_size(*_slstm_sizes(inputs[0])))
        output, final = _slstm_forward(tuple(inputs), reset, forget_activation, trace)
        gates, *others = inputs
        ctx.save_for_backward(*others, reset, output, trace)
        # of the gates themselves, the largest tensor here, the backward pass needs nothing but the layout
        ctx.gates_layout = torch.empty_like(gates, device="meta")
        ctx.forget_activation = forget_activation
        ctx.mark_non_differentiable(final.stabilizer)
        return output, *final

    @staticmethod
    def backward(
        ctx: Any, d_output: Tensor, d_cell: Tensor, d_normalizer: Tensor, d_hidden: Tensor, d_stabilizer: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the forward arguments."""
        refuse_second_derivative("sLSTM")
        *inputs, reset, output, trace = ctx.saved_tensors
        recurrent, *state = (x.contiguous() for x in inputs)
        reset = dense(reset)
        outer = (d_output.contiguous(), d_cell.contiguous(), d_normalizer.contiguous(), d_hidden.contiguous())
        # Dense gates keep their order of dimensions, so that what made them takes the gradient without a copy.
        layout = ctx.gates_layout
        d_gates = _readable(output.new_empty_strided(layout.shape, layout.stride()))
        gradients = [d_gates, *(torch.empty_like(x) for x in (recurrent, *state[:3]))]
        compiled().slstm_backward(
            *(*_slstm_sizes(d_gates), d_gates.data_ptr(), *d_gates.stride()[:4], recurrent.data_ptr()),
            *(pointer(reset), ctx.forget_activation == "exp", *(x.data_ptr() for x in state)),
            *(output.data_ptr(), trace.data_ptr()),
            *(x.data_ptr() for x in (*outer, *gradients)),
            torch.get_num_threads(),
        )
        return *gradients, None, None, None


def refuse_second_derivative(operation: str) -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the compiled {operation} cannot be differentiated twice; for create_graph call the kernels with "
            "backend='reference', or set XLSTM_RL_NATIVE=0"
        )
