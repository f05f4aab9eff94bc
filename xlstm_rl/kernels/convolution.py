"""Depthwise causal convolution over time that does not look across episode starts."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlstm_rl.kernels.argument_checks import check_place, check_reset
from xlstm_rl.kernels.spoilt import known_finite


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve every channel over the last W inputs of its episode.

    Args:
        x: [B, T, D], T may be zero.
        weight: [D, W], the last tap is for the current input.
        bias: [D] or None.
        state: [B, W - 1, D], the inputs before x, oldest first; zeros (or None) for none.
        reset: [B, T] bool or None, true where an episode starts: earlier inputs are forgotten.

    Returns:
        Output [B, T, D] and the window [B, W - 1, D] to pass as the next state.

    Raises:
        ValueError: if shapes do not fit together.
        TypeError: if reset is not bool.
    """
    _check(x, weight, bias, state, reset)
    B, T, D = x.shape
    W = weight.shape[1]
    if state is None:
        state = x.new_zeros(B, W - 1, D)
    if T == 1:
        y, window = _single_step(x, weight, bias, state, reset)
        return _without_spoilt_gradients(y), window
    inputs = torch.cat((state, x), 1)  # [B, W - 1 + T, D]
    segment = None if reset is None else pad(reset, (W - 1, 0)).cumsum(1)  # [B, W - 1 + T]
    y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for tap in range(W - 1):
        past = inputs[:, tap : tap + T]
        if segment is not None:
            past = past.masked_fill((segment[:, tap : tap + T] != segment[:, W - 1 :])[..., None], 0.0)
        y = torch.addcmul(y, past, weight[:, tap])
    y = _without_spoilt_gradients(y)
    window = inputs[:, T:]
    if segment is None or W == 1:
        return y, window.clone()
    return y, window.masked_fill((segment[:, T:] != segment[:, -1:])[..., None], 0.0)


def _single_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The convolution for T = 1, in as few operations as possible: acting spends its time here."""
    if reset is not None:
        state = state.masked_fill(reset[:, :, None], 0.0)
    inputs = torch.cat((state, x), 1)  # [B, W, D]
    y = (inputs * weight.t()).sum(1, keepdim=True)
    return y if bias is None else y + bias, inputs[:, 1:]


def _without_spoilt_gradients(y: Tensor) -> Tensor:
    """The same values; what is not finite passes no gradient on to the steps before, which did not make it so."""
    if not y.requires_grad or known_finite(y):
        return y
    return torch.where(y.isfinite(), y, y.detach())


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, reset: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed is [B, T, D]")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed is [D, W] with D = {D} and W >= 1")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed is ({D},)")
    if state is not None and state.shape != (B, weight.shape[1] - 1, D):
        raise ValueError(f"state has shape {tuple(state.shape)}; allowed is {(B, weight.shape[1] - 1, D)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("state", state), ("reset", reset)):
        if tensor is not None:
            check_place(name, tensor, x)
    if reset is not None:
        check_reset(reset, B, T)
