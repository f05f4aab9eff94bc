"""Calls of the launchers on small tensors of any width and dtype, for compiling."""

import torch

from xlstm_rl.kernels import triton_configs, triton_operators

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
    state = torch.zeros(B, H, D, D), torch.zeros(B, H, D), torch.zeros(B, H)
    inputs = (q, k, v, *gates, *state, torch.zeros(B, T, dtype=torch.bool))
    if direction == "backward":
        saved = (v, *state[:2], torch.zeros(2, B, T, H))
        triton_operators.launch_mlstm_backward(v, *state[:2], *inputs, *saved, forget_activation)
    else:
        triton_operators.launch_mlstm(*inputs, forget_activation, direction == "forward")


def _slstm(direction: str, D: int, dtype: torch.dtype, forget_activation: str, B: int, T: int) -> None:
    H = 2
    T = 1 if direction == "acting" else T
    gates, recurrent = torch.zeros(B, T, 4, H, D, dtype=dtype), torch.zeros(4, H, D, D, dtype=dtype)
    state = [torch.zeros(B, H, D) for _ in range(4)]
    inputs = (gates, recurrent, *state, torch.zeros(B, T, dtype=torch.bool))
    if direction == "backward":
        output = torch.zeros(B, T, H, D, dtype=dtype)
        saved = (output, torch.zeros(triton_configs.slstm_trace_fields(gates), B, T, H, D))
        triton_operators.launch_slstm_backward(output, *state[:3], *inputs, *saved, forget_activation)
    else:
        triton_operators.launch_slstm(*inputs, forget_activation, direction == "forward")
