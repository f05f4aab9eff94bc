"""One acting step of a whole block in one compiled call, without gradients."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.cpp_extension import compiled, why_not
from xlstm_rl.kernels.cpp_sequence import pointer
from xlstm_rl.kernels.states import ForgetActivation, MLSTMState, SLSTMState


class MLSTMWeights(NamedTuple):
    """Weights of an mLSTM block with inner width N, in the order of its computation."""

    norm: Tensor  # [D]
    up: Tensor  # [2 N, D]
    up_bias: Tensor | None  # [2 N]
    conv: Tensor | None  # [N, W]
    conv_bias: Tensor | None  # [N]
    query_key: Tensor  # [N / G, 2 G, G], blocks of size G
    query_key_bias: Tensor | None  # [N / G, 2 G]
    value: Tensor  # [N / G, G, G]
    value_bias: Tensor | None  # [N / G, G]
    gates: Tensor  # [2 H, 3 N]
    gates_bias: Tensor  # [2 H]
    head_norm: Tensor  # [N]
    skip: Tensor  # [N]
    down: Tensor  # [D, N]
    down_bias: Tensor | None  # [D]


class SLSTMWeights(NamedTuple):
    """Weights of an sLSTM block with feed-forward width F, in the order of its computation."""

    norm: Tensor  # [D]
    conv: Tensor | None  # [D, W]
    conv_bias: Tensor | None  # [D]
    input_forget: Tensor  # [H, 2 D / H, D / H]
    cell_output: Tensor  # [H, 2 D / H, D / H]
    gate_bias: Tensor  # [4, H, D / H]
    recurrent: Tensor  # [4, H, D / H, D / H]
    head_norm: Tensor  # [D]
    ffn_norm: Tensor | None  # [D]
    ffn_up: Tensor | None  # [2 F, D]
    ffn_up_bias: Tensor | None  # [2 F]
    ffn_down: Tensor | None  # [D, F]
    ffn_down_bias: Tensor | None  # [D]


def can_step(x: Tensor) -> bool:
    """Whether blocks may take compiled steps from x [B, T, D]: T is one, and no gradient is asked for."""
    return (
        x.shape[1] == 1 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and why_not(x) is None
    )


def mlstm_block_step(
    x: Tensor,
    weights: MLSTMWeights,
    state: MLSTMState,
    window: Tensor,
    reset: Tensor | None,
    *,
    epsilon: float,
    gate_soft_cap: float | None,
    forget_activation: ForgetActivation,
    sigmoid_input: bool,
    reuse_state: bool = False,
) -> tuple[Tensor, MLSTMState, Tensor] | None:
    """Step of an mLSTM block.

    Args:
        x: [B, 1, D]; ask `can_step` first.
        weights: of the block.
        state: of the cell, heads of width K = N / H.
        window: [B, W - 1, N], what the convolution saw.
        reset: [B, 1] bool or None.
        epsilon: added to the variance in the norms.
        gate_soft_cap: soft cap of the gates, or None.
        forget_activation: of the forget gate.
        sigmoid_input: whether the input gate is a sigmoid and not an exponential.
        reuse_state: write the new state over the old one, where a cache holds one but not two of them.

    Returns:
        Output [B, 1, D], state and window; or None where tensors do not fit together as expected here.
    """
    B, _, D = x.shape
    N, H = weights.down.shape[1], weights.gates_bias.shape[0] // 2
    W = 0 if weights.conv is None else weights.conv.shape[1]
    K = N // H
    addresses = weight_addresses(weights, x.dtype)
    shapes = ((B, H, K, K), (B, H, K), (B, H), (B, max(W - 1, 0), N))
    if addresses is None or not state_fits(x, (*state, window), shapes, reset):
        return None
    tensors = [leaf.contiguous() for leaf in (x, *state, window)]
    new = _room_for_results(tensors, reuse_state)
    dense, cell, normalizer, stabilizer, past = [leaf.data_ptr() for leaf in tensors]
    y, new_cell, new_normalizer, new_stabilizer, new_window = [leaf.data_ptr() for leaf in new]
    compiled().mlstm_block_step(
        *(x.element_size(), B, D, N, H, weights.value.shape[2], dense, *addresses[:3]),
        *(W, *addresses[3:5], past, new_window, *addresses[5:]),
        *(cell, normalizer, stabilizer, pointer(reset), y, new_cell, new_normalizer, new_stabilizer),
        *(epsilon, gate_soft_cap or 0.0, forget_activation == "exp", sigmoid_input, torch.get_num_threads()),
    )
    return new[0], MLSTMState(*new[1:4]), new[4]


def slstm_block_step(
    x: Tensor,
    weights: SLSTMWeights,
    state: SLSTMState,
    window: Tensor,
    reset: Tensor | None,
    *,
    epsilon: float,
    forget_activation: ForgetActivation,
    reuse_state: bool = False,
) -> tuple[Tensor, SLSTMState, Tensor] | None:
    """Step of an sLSTM block and its feed-forward network, if it has one; see `mlstm_block_step`."""
    B, _, D = x.shape
    H = weights.recurrent.shape[1]
    W = 0 if weights.conv is None else weights.conv.shape[1]
    F = 0 if weights.ffn_down is None else weights.ffn_down.shape[1]
    addresses = weight_addresses(weights, x.dtype)
    shapes = (*((B, H, D // H),) * 4, (B, max(W - 1, 0), D))
    if addresses is None or not state_fits(x, (*state, window), shapes, reset):
        return None
    tensors = [leaf.contiguous() for leaf in (x, *state, window)]
    new = _room_for_results(tensors, reuse_state)
    dense, *old_state, past = [leaf.data_ptr() for leaf in tensors]
    y, *new_state, new_window = [leaf.data_ptr() for leaf in new]
    compiled().slstm_block_step(
        *(x.element_size(), B, D, H, F, dense, addresses[0]),
        *(W, *addresses[1:3], past, new_window, *addresses[3:]),
        *(*old_state, pointer(reset), y, *new_state),
        *(epsilon, forget_activation == "exp", torch.get_num_threads()),
    )
    return new[0], SLSTMState(*new[1:5]), new[5]


def _room_for_results(tensors: list[Tensor], reuse_state: bool) -> list[Tensor]:
    """Memory for the output and the new state, given input and old state."""
    x, *state = tensors
    return [torch.empty_like(x), *(state if reuse_state else map(torch.empty_like, state))]


def weight_addresses(weights: Iterable[Tensor | None], dtype: torch.dtype) -> list[int] | None:
    """Addresses, zero for None; or None if the memory of one may not be read in order as that dtype."""
    addresses = []
    for weight in weights:
        if weight is None:
            addresses.append(0)
        elif weight.dtype == dtype and weight.is_cpu and weight.is_contiguous():
            addresses.append(weight.data_ptr())
        else:
            return None
    return addresses


def state_fits(x: Tensor, state: Iterable[Tensor], shapes: Iterable[tuple[int, ...]], reset: Tensor | None) -> bool:
    """Whether state and resets have the shapes, dtype and device that belong to x."""
    if reset is not None and not (
        reset.shape == x.shape[:2] and reset.dtype == torch.bool and reset.is_cpu and reset.is_contiguous()
    ):
        return False
    dtype = x.dtype
    for leaf, shape in zip(state, shapes, strict=True):
        if leaf.shape != shape or leaf.dtype != dtype or not leaf.is_cpu:
            return False
    return True
