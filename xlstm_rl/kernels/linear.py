"""Linear maps of many rows, by oneDNN where torch's own product is slower."""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_rl.kernels.tracing import is_plain, transformed

# Products of floats go to MKL in torch, which computes with half of the vector width on processors of other makers than
# Intel. oneDNN does not; it takes some 10 us to begin, as long as a smaller product takes.
SMALLEST = 512 * 64 * 128
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_USABLE = _product is not None and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, up to rounding.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [..., N].
    """
    if not _pays(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(rows, weight, bias) if torch.is_grad_enabled() else _times(rows, weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _USABLE
        and x.numel() * len(weight) >= SMALLEST
        and all(part is None or _is_known(part) for part in (x, weight, bias))
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
    )


def _is_known(part: Tensor) -> bool:
    return is_plain(part) and part.is_cpu and part.dtype is torch.float32 and part.layout is torch.strided


def _times(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, K] and [N, K] -> [M, N]."""
    if torch.is_grad_enabled():
        # a backward pass that is itself to be differentiated
        return F.linear(rows, weight, bias)
    return _product(rows, weight, bias, "none", [], "")  # type: ignore[misc, no-any-return]


class _Linear(torch.autograd.Function):
    """A product and its two gradients, which are products too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute and keep the factors."""
        ctx.save_for_backward(rows, weight)
        return _times(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients that are asked for, in the order of the arguments."""
        rows, weight = ctx.saved_tensors
        by_rows, by_weight, by_bias = ctx.needs_input_grad
        return (
            _times(by_y, weight.t()) if by_rows else None,
            _times(by_y.t(), rows.t()) if by_weight else None,
            by_y.sum(0) if by_bias else None,
        )
