"""One acting step of a whole block in one compiled call, without gradients."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.cpp_extension import compiled, why_not
from xlstm_rl.kernels.cpp_sequence import dense
from xlstm_rl.kernels.states import ForgetActivation

Shape = tuple[int, ...]

OPTIONAL = ("up_bias", "query_key_bias", "value_bias", "down_bias", "ffn_up_bias", "ffn_down_bias")
"""Weights that a layer may do without; the others are missing only where their layer is."""


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

    @property
    def mixer(self) -> tuple[Tensor | None, ...]:
        """Those between the projections, from the convolution to the skip."""
        return self[3:13]


class MLSTMSizes(NamedTuple):
    """Sizes of an mLSTM block."""

    D: int
    """Width."""
    N: int
    """Inner width."""
    H: int
    """Heads."""
    G: int
    """Features of a block of the projections to q, k and v."""
    W: int
    """Steps that the convolution sees; zero for none."""

    def weight_shapes(self) -> tuple[Shape | None, ...]:
        """Of `MLSTMWeights`; None for those of layers that the block does not have."""
        D, N, H, G, W = self
        groups = N // G
        return (
            *((D,), (2 * N, D), (2 * N,), *(((N, W), (N,)) if W else (None, None))),
            *((groups, 2 * G, G), (groups, 2 * G), (groups, G, G), (groups, G), (2 * H, 3 * N), (2 * H,)),
            *((N,), (N,), (D, N), (D,)),
        )

    def state_shapes(self) -> tuple[Shape, ...]:
        """Of the leaves of the state of a row: cell, normalizer, stabilizer and window."""
        _, N, H, _, W = self
        K = N // H
        return (H, K, K), (H, K), (H,), (max(W - 1, 0), N)


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


class SLSTMSizes(NamedTuple):
    """Sizes of an sLSTM block."""

    D: int
    """Width."""
    H: int
    """Heads."""
    F: int
    """Inner width of the feed-forward network; zero for none."""
    W: int
    """Steps that the convolution sees; zero for none."""

    def weight_shapes(self) -> tuple[Shape | None, ...]:
        """Of `SLSTMWeights`; None for those of layers that the block does not have."""
        D, H, F, W = self
        K = D // H
        return (
            *((D,), *(((D, W), (D,)) if W else (None, None))),
            *((H, 2 * K, K), (H, 2 * K, K), (4, H, K), (4, H, K, K), (D,)),
            *(((D,), (2 * F, D), (2 * F,), (D, F), (D,)) if F else (None,) * 5),
        )

    def state_shapes(self) -> tuple[Shape, ...]:
        """Of the leaves of the state of a row: cell, normalizer, hidden, stabilizer and window."""
        return (*((self.H, self.D // self.H),) * 4, (max(self.W - 1, 0), self.D))


class MLSTMOptions(NamedTuple):
    """What an mLSTM block is besides its weights."""

    epsilon: float
    """Added to the variance in the norms."""
    gate_soft_cap: float | None
    forget_activation: ForgetActivation
    sigmoid_input: bool
    """Whether the input gate is a sigmoid and not an exponential."""


class SLSTMOptions(NamedTuple):
    """What an sLSTM block is besides its weights."""

    epsilon: float
    """Added to the variance in the norms."""
    forget_activation: ForgetActivation


def mlstm_plan(sizes: MLSTMSizes, options: MLSTMOptions) -> bytes:
    """What stays the same from one compiled step of an mLSTM block to the next, as cpp/blocks.h reads it."""
    epsilon, gate_soft_cap, forget_activation, sigmoid_input = options
    numbers = (epsilon, gate_soft_cap or 0.0, forget_activation == "exp", sigmoid_input)
    constants = struct.pack("=5q2d2q", *sizes, *numbers)
    return constants + _packed_shapes(MLSTMWeights._fields, sizes)


def slstm_plan(sizes: SLSTMSizes, options: SLSTMOptions) -> bytes:
    """The same for an sLSTM block with its feed-forward network, if it has one."""
    constants = struct.pack("=4qdq", *sizes, options.epsilon, options.forget_activation == "exp")
    return constants + _packed_shapes(SLSTMWeights._fields, sizes)


def _packed_shapes(names: Iterable[str], sizes: MLSTMSizes | SLSTMSizes) -> bytes:
    """Of the weights and of the leaves of the state, as the structure Shape in cpp/tensors.h."""
    weights = [(shape, name in OPTIONAL) for name, shape in zip(names, sizes.weight_shapes(), strict=True)]
    state = [((-1, *shape), False) for shape in sizes.state_shapes()]
    return b"".join(
        struct.pack("=6q", -1 if shape is None else len(shape), optional, *(*(shape or ()), 0, 0, 0, 0)[:4])
        for shape, optional in (*weights, *state)
    )


Kind = Literal["mlstm_block_step", "slstm_block_step"]
Place = tuple[Mapping[str, Tensor | None], str]
"""Where a module holds a weight: a dictionary and the name there."""
Places = tuple[tuple[Mapping[str, Tensor | None], ...], tuple[str, ...]]


class KeptPlaces:
    """Where the weights of a block are, looked for again when one of its layers was replaced."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Places | None] = ((), None)

    def get(self, layers: tuple[Any, ...], find: Callable[[], Sequence[Place] | None]) -> Places | None:
        """Dictionaries and names, or None where the weights are not in the layers.

        Args:
            layers: of the block, the same ones as long as none is replaced.
            find: looks for the weights.
        """
        kept_layers, places = self._kept
        if layers != kept_layers:
            found = find()
            places = None if found is None else tuple(zip(*found, strict=True))  # type: ignore[assignment]
            # at once, so that another thread never sees the layers of one and the places of another
            self._kept = layers, places
        return places

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the block has layers of its own."""
        return KeptPlaces, ()


def can_step(x: Tensor) -> bool:
    """Whether blocks may take compiled steps from x [B, T, D]: T is one, and no gradient is asked for."""
    return (
        x.shape[1] == 1 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and why_not(x) is None
    )


def block_step(
    kind: Kind,
    plan: bytes,
    places: Places,
    x: Tensor,
    state: tuple[Tensor, ...],
    reset: Tensor | None,
    reuse_state: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None] | None:
    """Step of a block.

    Args:
        kind: of the block.
        plan: of the block.
        places: of its weights.
        x: [B, 1, D]; ask `can_step` first.
        state: leaves of the state of the cell and, last, the window that the convolution saw.
        reset: [B, 1] bool or None.
        reuse_state: write the new state over the old one, where a cache holds one but not two of them.

    Returns:
        Output [B, 1, D] and the leaves of the new state, or None for them if `state` now holds it; or None for both
        where tensors do not fit together as expected here.
    """
    step, threads = getattr(compiled(), kind), torch.get_num_threads()
    y, new = torch.empty_like(x), None if reuse_state else _beside(state)
    if step(threads, x, plan, *places, state, reset, y, new):
        return y, new
    # perhaps because memory is not in order
    x, reset, state = x.contiguous(), dense(reset), tuple(leaf.contiguous() for leaf in state)
    y, new = torch.empty_like(x), _beside(state)
    return (y, new) if step(threads, x, plan, *places, state, reset, y, new) else None


def _beside(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(leaf) for leaf in state)


def weights_fit(weights: MLSTMWeights, sizes: MLSTMSizes, dtype: torch.dtype) -> bool:
    """Whether the memory of all weights may be read in order, as the shapes of the block and that dtype."""
    for name, weight, shape in zip(weights._fields, weights, sizes.weight_shapes(), strict=True):
        if weight is None:
            if shape is not None and name not in OPTIONAL:
                return False
        elif not (weight.shape == shape and weight.dtype is dtype and weight.is_cpu and weight.is_contiguous()):
            return False
    return True


def state_fits(
    x: Tensor,
    state: Iterable[Tensor],
    shapes: Iterable[tuple[int, ...]],
    reset: Tensor | None,
    reset_shape: tuple[int, int],
) -> bool:
    """Whether state and resets have the shapes, dtype and device that belong to x."""
    if reset is not None and not (
        reset.shape == reset_shape and reset.dtype is torch.bool and reset.is_cpu and reset.is_contiguous()
    ):
        return False
    dtype = x.dtype
    for leaf, shape in zip(state, shapes, strict=True):
        if leaf.shape != shape or leaf.dtype is not dtype or not leaf.is_cpu:
            return False
    return True
