"""One acting step of a whole block in one compiled call, without gradients."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels.cpp_extension import compiled, why_not
from xlstm_rl.kernels.cpp_sequence import pointer
from xlstm_rl.kernels.states import ForgetActivation


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

    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of `MLSTMWeights`."""
        D, N, H, G, W = self
        groups = N // G
        return (
            *((D,), (2 * N, D), (2 * N,), (N, W), (N,)),
            *((groups, 2 * G, G), (groups, 2 * G), (groups, G, G), (groups, G), (2 * H, 3 * N), (2 * H,)),
            *((N,), (N,), (D, N), (D,)),
        )

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
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

    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of `SLSTMWeights`."""
        D, H, F, W = self
        K = D // H
        return (
            *((D,), (D, W), (D,), (H, 2 * K, K), (H, 2 * K, K), (4, H, K), (4, H, K, K), (D,)),
            *((D,), (2 * F, D), (2 * F,), (D, F), (D,)),
        )

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
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


class StepPlan:
    """What stays the same from one compiled step of a block to the next.

    Args:
        packed: sizes, addresses of the weights and options, as the structures in cpp/blocks.h.
        row_shapes: of the leaves of the state of one row, the window last.
        dtype: of the weights.
    """

    def __init__(self, packed: bytes, row_shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.packed, self.dtype = packed, dtype
        self._row_shapes = row_shapes
        self._shapes: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def shapes(self, B: int) -> list[tuple[int, ...]]:
        """Shapes of the leaves of the state of B rows."""
        if self._shapes[0] != B:
            self._shapes = (B, [(B, *shape) for shape in self._row_shapes])
        return self._shapes[1]


Kind = Literal["mlstm_block_step", "slstm_block_step"]
Place = tuple[Mapping[str, Tensor | None], str]
"""Where a module holds a weight: a dictionary and the name there."""


class _Kept(NamedTuple):
    """A plan and what it holds for."""

    plan: StepPlan | None = None
    layers: tuple[Any, ...] = ()
    places: Sequence[Place] = ()
    addresses: list[int] | None = None


class KeptPlan:
    """The plan of a block, made again when a layer or a weight is no longer where it was."""

    def __init__(self) -> None:
        self._kept = _Kept()

    def get(
        self,
        layers: tuple[Any, ...],
        places: Callable[[], Sequence[Place] | None],
        make: Callable[[Sequence[Tensor | None]], StepPlan | None],
    ) -> StepPlan | None:
        """The plan, or None where the block cannot have one.

        Args:
            layers: of the block, the same ones as long as none is replaced.
            places: finds the weights in the layers, or None if they are not there.
            make: makes the plan of weights.
        """
        plan, kept_layers, kept_places, addresses = self._kept
        if plan is None or layers != kept_layers or addresses != _addresses(kept_places):
            found = places() or ()
            addresses = _addresses(found)
            plan = make([held[name] for held, name in found]) if found and addresses is not None else None
            # at once, so that another thread never sees a plan with the addresses of another
            self._kept = _Kept(plan, layers, found, addresses)
        return plan


def _addresses(places: Sequence[Place]) -> list[int] | None:
    """Addresses of weights, zero for None, -1 where memory is not in order; None if one is gone from its place."""
    try:
        return [
            0 if (weight := held[name]) is None else weight.data_ptr() if weight.is_contiguous() else -1
            for held, name in places
        ]
    except KeyError:
        return None


def mlstm_plan(weights: MLSTMWeights, sizes: MLSTMSizes, options: MLSTMOptions) -> StepPlan | None:
    """The plan of an mLSTM block; None if a weight has another shape or its memory may not be read in order."""
    addresses = weight_addresses(weights, sizes.weight_shapes(), weights.up.dtype)
    if addresses is None:
        return None
    epsilon, gate_soft_cap, forget_activation, sigmoid_input = options
    numbers = (epsilon, gate_soft_cap or 0.0, forget_activation == "exp", sigmoid_input)
    packed = struct.pack("=5q15Q2d2q", *sizes, *addresses, *numbers)
    return StepPlan(packed, sizes.state_shapes(), weights.up.dtype)


def slstm_plan(weights: SLSTMWeights, sizes: SLSTMSizes, options: SLSTMOptions) -> StepPlan | None:
    """The plan of an sLSTM block with its feed-forward network, if it has one; see `mlstm_plan`."""
    addresses = weight_addresses(weights, sizes.weight_shapes(), weights.recurrent.dtype)
    if addresses is None:
        return None
    numbers = (options.epsilon, options.forget_activation == "exp")
    packed = struct.pack("=4q13Qdq", *sizes, *addresses, *numbers)
    return StepPlan(packed, sizes.state_shapes(), weights.recurrent.dtype)


def can_step(x: Tensor) -> bool:
    """Whether blocks may take compiled steps from x [B, T, D]: T is one, and no gradient is asked for."""
    return (
        x.shape[1] == 1 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and why_not(x) is None
    )


def block_step(
    kind: Kind, x: Tensor, plan: StepPlan, state: tuple[Tensor, ...], reset: Tensor | None, reuse_state: bool
) -> list[Tensor] | None:
    """Step of a block.

    Args:
        kind: of the block.
        x: [B, 1, D]; ask `can_step` first.
        plan: of the block.
        state: leaves of the state of the cell and, last, the window that the convolution saw.
        reset: [B, 1] bool or None.
        reuse_state: write the new state over the old one, where a cache holds one but not two of them.

    Returns:
        Output [B, 1, D] and the leaves of the new state; or None where tensors do not fit together as expected here.
    """
    B = x.shape[0]
    if x.dtype is not plan.dtype or not state_fits(x, state, plan.shapes(B), reset, (B, 1)):
        return None
    x, *old = [leaf.contiguous() for leaf in (x, *state)]
    y = torch.empty_like(x)
    *cell, window = [leaf.data_ptr() for leaf in old]
    if reuse_state:
        new, new_cell, new_window = old, cell, window
    else:
        new = [torch.empty_like(leaf) for leaf in old]
        *new_cell, new_window = [leaf.data_ptr() for leaf in new]
    getattr(compiled(), kind)(
        *(x.element_size(), plan.packed, B, x.data_ptr(), window, new_window, *cell, pointer(reset)),
        *(y.data_ptr(), *new_cell, torch.get_num_threads()),
    )
    return [y, *new]


def weight_addresses(
    weights: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> list[int] | None:
    """Addresses, zero for None; or None if the memory of one may not be read in order as that shape and dtype."""
    addresses = []
    for weight, shape in zip(weights, shapes, strict=True):
        if weight is None:
            addresses.append(0)
        elif weight.shape == shape and weight.dtype is dtype and weight.is_cpu and weight.is_contiguous():
            addresses.append(weight.data_ptr())
        else:
            return None
    return addresses


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
