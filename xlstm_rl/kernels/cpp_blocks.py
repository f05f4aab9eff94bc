"""One acting step of a whole block in one compiled call, without gradients."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

# By their names alone: acting looks them up at every step of every block.
from torch import Tensor, empty_like, get_num_threads, is_autocast_enabled, is_grad_enabled

from xlstm_rl.kernels.cpp_extension import compiled, extension, readable, why_not_now
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


Kind = Literal["mlstm_block_step", "slstm_block_step"]
Place = tuple[Mapping[str, Tensor | None], str]
"""Where a module holds a weight: a dictionary and the name there."""


class StepPlan(NamedTuple):
    """What a compiled step of a block knows beforehand."""

    packed: bytes
    """Constants and shapes, as cpp/blocks.h reads them."""
    holders: tuple[Mapping[str, Tensor | None], ...]
    """Dictionaries that hold the weights, in their order,"""
    names: tuple[str, ...]
    """and the name of each there."""


class KeptPlan:
    """The plan of a block, made again when one of its layers was replaced."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], StepPlan | None] = ((), None)

    def get(self, layers: tuple[Any, ...], make: Callable[[], StepPlan | None]) -> StepPlan | None:
        """The plan, or None where the layers are such that there is none.

        Args:
            layers: of the block, the same ones as long as none is replaced.
            make: makes the plan.
        """
        kept_layers, plan = self._kept
        if layers != kept_layers:
            plan = make()
            # at once, so that another thread never sees the layers of one and the plan of another
            self._kept = layers, plan
        return plan

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the block has layers of its own, and a file outlives the layout of plans."""
        return KeptPlan, ()


def mlstm_plan(sizes: MLSTMSizes, options: MLSTMOptions, places: Sequence[Place]) -> StepPlan:
    """The plan of an mLSTM block.

    Args:
        sizes: of the block.
        options: of the block.
        places: of `MLSTMWeights`.
    """
    epsilon, gate_soft_cap, forget_activation, sigmoid_input = options
    numbers = (epsilon, gate_soft_cap or 0.0, forget_activation == "exp", sigmoid_input)
    return _plan(struct.pack("=5q2d2q", *sizes, *numbers), MLSTMWeights._fields, sizes, places)


def slstm_plan(sizes: SLSTMSizes, options: SLSTMOptions, places: Sequence[Place]) -> StepPlan:
    """The same for an sLSTM block with its feed-forward network, if it has one."""
    constants = struct.pack("=4qdq", *sizes, options.epsilon, options.forget_activation == "exp")
    return _plan(constants, SLSTMWeights._fields, sizes, places)


def _plan(constants: bytes, fields: Iterable[str], sizes: MLSTMSizes | SLSTMSizes, places: Sequence[Place]) -> StepPlan:
    # Every step checks what it finds against these shapes in C++, which costs less there than one attribute of a module
    # costs here. Of a state, -1 is the number of rows, which is known with x only.
    weights = [(shape, name in OPTIONAL) for name, shape in zip(fields, sizes.weight_shapes(), strict=True)]
    state = [((-1, *shape), False) for shape in sizes.state_shapes()]
    # The structure Shape in cpp/tensors.h, six numbers of 64 bits: dimensions (-1: there is none), whether it may be
    # missing, and up to four sizes.
    shapes = [
        struct.pack("=6q", -1 if shape is None else len(shape), optional, *(*(shape or ()), 0, 0, 0, 0)[:4])
        for shape, optional in (*weights, *state)
    ]
    holders, names = zip(*places, strict=True)
    return StepPlan(constants + b"".join(shapes), holders, names)


def can_step(x: Tensor) -> bool:
    """Whether blocks may take compiled steps from x: no gradient is asked for, and the compiled kernels are there."""
    return (
        not is_grad_enabled()
        and x.is_cpu
        and not is_autocast_enabled("cpu")
        and why_not_now() is None
        and extension().module is not None
    )


def block_step(
    kind: Kind,
    plan: StepPlan,
    x: Tensor,
    state: tuple[Tensor, ...],
    reset: Tensor | None,
    reuse_state: bool,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Step of a block.

    Args:
        kind: of the block.
        plan: of the block.
        x: [B, D] or [B, 1, D]; ask `can_step` first.
        state: leaves of the state of the cell and, last, the window that the convolution saw.
        reset: bool [B], or [B, 1] if x has an axis of time, or None.
        reuse_state: write the new state over the old one, where a cache holds one but not two of them.

    Returns:
        Output like x and the leaves of the new state, which are `state` itself if it was written over; or None where
        tensors do not fit together as expected here.
    """
    step, threads = getattr(compiled(), kind), get_num_threads()
    y, new = empty_like(x), None if reuse_state else _beside(state)
    if step(threads, x, *plan, state, reset, y, new):
        return y, state if new is None else new
    # The step was not taken. Copies are tried where tensors only do not lie in order; anything else is for torch.
    if all(tensor is None or tensor.is_contiguous() for tensor in (x, reset, *state)):
        return None
    x, reset, state = x.contiguous(), dense(reset), tuple(leaf.contiguous() for leaf in state)
    y, new = empty_like(x), _beside(state)
    return (y, new) if step(threads, x, *plan, state, reset, y, new) else None


def _beside(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(empty_like, state))


def weights_fit(weights: MLSTMWeights, sizes: MLSTMSizes, dtype: torch.dtype) -> bool:
    """Whether the memory of all weights may be read in order, as the shapes of the block and that dtype."""
    for name, weight, shape in zip(weights._fields, weights, sizes.weight_shapes(), strict=True):
        if weight is None:
            if shape is not None and name not in OPTIONAL:
                return False
        elif not (weight.shape == shape and weight.dtype is dtype and readable(weight) and weight.is_contiguous()):
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
        reset.shape == reset_shape and reset.dtype is torch.bool and readable(reset) and reset.is_contiguous()
    ):
        return False
    dtype = x.dtype
    for leaf, shape in zip(state, shapes, strict=True):
        if leaf.shape != shape or leaf.dtype is not dtype or not readable(leaf):
            return False
    return True
