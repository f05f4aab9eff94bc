"""Calls of the launchers on small tensors of any width and dtype, for compiling."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_rl.kernels import triton_configs, triton_operators

KERNELS = ("mlstm_forward", "mlstm_step", "mlstm_backward", "slstm_forward", "slstm_acting", "slstm_backward")
ONE_STEP = ("mlstm_step", "slstm_acting")


class Sizes(NamedTuple):
    """What no kernel is compiled for; `offset` is that of the tensors from an aligned address, in elements."""

    B: int = 3
    T: int = 33
    H: int = 2
    offset: int = 0

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(math.prod(shape) + self.offset, dtype=dtype)[self.offset :].view(shape)


USUAL = Sizes()


def call(kernel: str, D: int, dtype: torch.dtype, forget_activation: str = "sigmoid", sizes: Sizes = USUAL) -> None:
    """Launch a kernel once."""
    operation, direction = kernel.split("_")
    sizes = sizes._replace(T=1) if kernel in ONE_STEP else sizes
    {"mlstm": _mlstm, "slstm": _slstm}[operation](direction, D, dtype, forget_activation, sizes)


def _mlstm(direction: str, D: int, dtype: torch.dtype, forget_activation: str, sizes: Sizes) -> None:
    B, T, H, _ = sizes
    q, k, v = (sizes.zeros(B, T, H, D, dtype=dtype) for _ in range(3))
    gates = [sizes.zeros(B, T, H, dtype=dtype) for _ in range(2)]
    state = sizes.zeros(B, H, D, D), sizes.zeros(B, H, D), sizes.zeros(B, H)
    inputs = (q, k, v, *gates, *state, sizes.zeros(B, T, dtype=torch.bool))
    if direction == "backward":
        saved = (v, *state[:2], sizes.zeros(2, B, T, H))
        triton_operators.launch_mlstm_backward(v, *state[:2], *inputs, *saved, forget_activation)
    else:
        triton_operators.launch_mlstm(*inputs, forget_activation, direction == "forward")


def _slstm(direction: str, D: int, dtype: torch.dtype, forget_activation: str, sizes: Sizes) -> None:
    B, T, H, _ = sizes
    gates, recurrent = sizes.zeros(B, T, 4, H, D, dtype=dtype), sizes.zeros(4, H, D, D, dtype=dtype)
    state = [sizes.zeros(B, H, D) for _ in range(4)]
    inputs = (gates, recurrent, *state, sizes.zeros(B, T, dtype=torch.bool))
    if direction == "backward":
        output = sizes.zeros(B, T, H, D, dtype=dtype)
        saved = (output, sizes.zeros(triton_configs.slstm_trace_fields(gates), B, T, H, D))
        triton_operators.launch_slstm_backward(output, *state[:3], *inputs, *saved, forget_activation)
    else:
        triton_operators.launch_slstm(*inputs, forget_activation, direction == "forward")
