"""Calls of the launchers on small tensors of any width and dtype, for compiling."""

from typing import Any

import torch

from xlstm_rl.kernels import mlstm_triton, mlstm_triton_backward, slstm_triton, triton_configs

KERNELS = ("mlstm_forward", "mlstm_step", "mlstm_backward", "slstm_forward", "slstm_acting", "slstm_backward")
ONE_STEP = ("mlstm_step", "slstm_acting")


def call(kernel: str, D: int, dtype: torch.dtype, forget_activation: str = "sigmoid", B: int = 3, T: int = 33) -> None:
    """Launch a kernel once."""
    operation, direction = kernel.split("_")
    {"mlstm": _mlstm, "slstm": _slstm}[operation](direction, D, dtype, forget_activation, B, T)


def _mlstm(direction: str, D: int, dtype: torch.dtype, forget_activation: str, B: int, T: int) -> None:
    H = 2
    T = 1 if direction == "step" else T
    q, k, v = (torch.zeros(B, T, H, D, dtype=dtype) for _ in range(3))
    gates = [torch.zeros(B, T, H, dtype=dtype) for _ in range(2)]
    state: Any = torch.zeros(B, H, D, D), torch.zeros(B, H, D), torch.zeros(B, H)
    inputs: Any = (q, k, v, *gates, *state, torch.zeros(B, T, dtype=torch.bool))
    if direction == "backward":
        trace = torch.zeros(2, B, T, H)
        arguments: Any = (v, *state[:2], *inputs, v, *state[:2], trace, forget_activation)
        mlstm_triton_backward.backward(*arguments)
    else:
        arguments = (*inputs, forget_activation, direction == "forward")
        mlstm_triton.forward(*arguments)


def _slstm(direction: str, D: int, dtype: torch.dtype, forget_activation: str, B: int, T: int) -> None:
    H = 2
    T = 1 if direction == "acting" else T
    gates, recurrent = torch.zeros(B, T, 4, H, D, dtype=dtype), torch.zeros(4, H, D, D, dtype=dtype)
    state: Any = [torch.zeros(B, H, D) for _ in range(4)]
    inputs: Any = (gates, recurrent, *state, torch.zeros(B, T, dtype=torch.bool))
    if direction == "backward":
        output = torch.zeros(B, T, H, D, dtype=dtype)
        trace = torch.zeros(triton_configs.slstm_trace_fields(gates), B, T, H, D)
        arguments: Any = (output, *state[:3], *inputs, output, trace, forget_activation)
        slstm_triton.backward(*arguments)
    else:
        arguments = (*inputs, forget_activation, direction == "forward")
        slstm_triton.forward(*arguments)
