"""The mixer of an mLSTM block, all between its up- and down-projection, as one compiled call per direction."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.cpp_blocks import MLSTMOptions, MLSTMSizes, MLSTMWeights, state_fits, weights_fit
from xlstm_rl.kernels.cpp_extension import compiled, why_not
from xlstm_rl.kernels.cpp_sequence import dense, pointer, refuse_second_derivative
from xlstm_rl.kernels.spoilt import known_finite
from xlstm_rl.kernels.states import MLSTMState


def can_mix(x: Tensor) -> bool:
    """Whether the compiled mixer can compute with tensors like this one."""
    return why_not(x) is None and not torch.is_autocast_enabled("cpu")


def mlstm_mixer(
    x: Tensor,
    weights: MLSTMWeights,
    sizes: MLSTMSizes,
    state: MLSTMState,
    window: Tensor,
    reset: Tensor | None,
    options: MLSTMOptions,
) -> tuple[Tensor, MLSTMState, Tensor] | None:
    """Convolution, q, k, v, gates, mLSTM cell, norm of the heads, skip and output gate over a sequence.

    Args:
        x: [B, T, 2 N], what is mixed and the output gate before its SiLU; ask `can_mix` first.
        weights: of the block, of the dtype of x.
        sizes: of the block.
        state: of the cell, heads of width N / H.
        window: [B, W - 1, N], what the convolution saw.
        reset: [B, T] bool or None, true where an episode starts.
        options: of the block.

    Returns:
        Output [B, T, N], state and window; or None where tensors do not fit together as expected here, or the output
        is not finite: inputs of a sequence that are not would spoil steps before them, and the layers take more care.
        Differentiable once; all but the stabilizers and `reset` carry gradients.
    """
    B, T, columns = x.shape
    shapes = [(B, *shape) for shape in sizes.state_shapes()]
    reset = dense(reset)
    if 0 in (B, T) or columns != 2 * sizes.N or not weights_fit(weights, sizes, x.dtype):
        return None
    if not state_fits(x, (*state, window), shapes, reset, (B, T)):
        return None
    arguments = (x, window, *state[:2], state.stabilizer.detach(), *weights.mixer, reset, options)
    if torch.is_grad_enabled():
        y, new_window, *leaves = _Mixer.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        (y, new_window, *leaves), _ = _forward(_prepared(arguments))
    if not known_finite(y):
        return None
    return y, MLSTMState(*leaves), new_window


class _Call(NamedTuple):
    """Arguments of a compiled mixer: contiguous tensors, held for as long as the call reads them."""

    x: Tensor
    window: Tensor
    state: tuple[Tensor, ...]
    weights: tuple[Tensor | None, ...]
    reset: Tensor | None
    options: MLSTMOptions

    def numbers(self) -> tuple[int | float, ...]:
        """The arguments in the order in which the compiled functions take them."""
        # The order of `Call::mixer` in cpp/module.cpp. All lies in order in memory, so addresses and sizes do; zero
        # stands for a layer or a bias that is not there.
        B, T, N = *self.x.shape[:2], self.x.shape[2] // 2
        conv, conv_bias, query_key, *others = self.weights
        assert query_key is not None
        epsilon, gate_soft_cap, forget_activation, sigmoid_input = self.options
        return (
            *(self.x.element_size(), B, T, N, self.state[2].shape[1], query_key.shape[2], self.x.data_ptr()),
            *(0 if conv is None else conv.shape[1], pointer(conv), pointer(conv_bias), self.window.data_ptr()),
            *(query_key.data_ptr(), *map(pointer, others)),
            *(leaf.data_ptr() for leaf in self.state),
            *(pointer(self.reset), epsilon, gate_soft_cap or 0.0, forget_activation == "exp", sigmoid_input),
        )


def _prepared(arguments: tuple[Any, ...]) -> _Call:
    x, window, *rest, reset, options = arguments
    state, weights = (leaf.contiguous() for leaf in rest[:3]), map(dense, rest[3:])
    return _Call(x.contiguous(), window.contiguous(), tuple(state), tuple(weights), dense(reset), options)


def _forward(call: _Call) -> tuple[tuple[Tensor, ...], Tensor]:
    """Output, window and state; and what the backward pass needs."""
    numbers = call.numbers()
    B, T, columns = call.x.shape
    outputs = (
        call.x.new_empty(B, T, columns // 2),
        *(torch.empty_like(leaf) for leaf in (call.window, *call.state)),
    )
    trace = call.x.new_empty(compiled().mlstm_mixer_trace_size(*numbers))
    compiled().mlstm_mixer_forward(
        *numbers, *(leaf.data_ptr() for leaf in outputs), trace.data_ptr(), torch.get_num_threads()
    )
    return outputs, trace


class _Mixer(torch.autograd.Function):
    """The mixer with its backward pass; the stabilizer is a constant there, as it cancels exactly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Run forward and keep what the backward pass reads."""
        call = _prepared(arguments)
        outputs, trace = _forward(call)
        ctx.save_for_backward(call.x, call.window, *call.state, *call.weights, call.reset, trace)
        ctx.options = call.options
        ctx.mark_non_differentiable(outputs[-1])
        return outputs

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the forward arguments."""
        refuse_second_derivative("mLSTM mixer")
        *arguments, trace = ctx.saved_tensors
        call = _prepared((*arguments, ctx.options))
        numbers = call.numbers()
        outer = [by_output.contiguous() for by_output in by_outputs[:4]]
        by_x, by_window, by_cell, by_normalizer = (torch.empty_like(x) for x in (call.x, call.window, *call.state[:2]))
        by_weights = [None if weight is None else torch.empty_like(weight) for weight in call.weights]
        # Each row of the batch has room for its own gradients by the weights, which are added up in the order of the
        # rows, so that the sum does not depend on the number of threads.
        rows_of_weights = call.x.new_empty(compiled().mlstm_mixer_weights_size(*numbers))
        compiled().mlstm_mixer_backward(
            *numbers,
            trace.data_ptr(),
            *(by_output.data_ptr() for by_output in outer),
            *map(pointer, (by_x, by_window, *by_weights, by_cell, by_normalizer)),
            *(rows_of_weights.data_ptr(), torch.get_num_threads()),
        )
        return by_x, by_window, by_cell, by_normalizer, None, *by_weights, None, None
