"""Small layers that xLSTM blocks are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels import causal_conv
from xlstm_rl.kernels.linear import linear


def init_small(weight: Tensor, width: int) -> None:
    """Small init, N(0, 2 / (5 width)) (Nguyen and Salazar 2019)."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * width)))


def init_wang(weight: Tensor, width: int, num_blocks: int) -> None:
    """Init of projections into the residual stream, std 2 / (blocks sqrt(width)) (Wang 2021, GPT-J)."""
    nn.init.normal_(weight, std=2 / num_blocks / math.sqrt(width))


class Linear(nn.Linear):
    """A `torch.nn.Linear` whose product is faster on some processors."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)


class BlockLinear(nn.Module):
    """Block-diagonal linear maps of one input: each of `num_blocks` groups of features is projected on its own.

    Args:
        features: width of the input and of every map's output, a multiple of `num_blocks`.
        num_blocks: number of groups.
        num_maps: how many maps of the same input.
        bias: whether to add one.
    """

    bias: nn.Parameter | None

    def __init__(self, features: int, num_blocks: int, num_maps: int = 1, *, bias: bool = False) -> None:
        super().__init__()
        width = features // num_blocks
        self.num_maps = num_maps
        self.weight = nn.Parameter(torch.empty(num_blocks, num_maps * width, width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_blocks, num_maps * width)) if bias else None)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., features] to [num_maps, ..., features]."""
        blocks, _, width = self.weight.shape
        rows = x.reshape(-1, blocks, width).transpose(0, 1)  # [blocks, N, width]
        if self.bias is None:
            y = torch.bmm(rows, self.weight.transpose(1, 2))
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.transpose(1, 2))
        # one copy puts every map's output in one piece
        return y.view(blocks, -1, self.num_maps, width).permute(2, 1, 0, 3).reshape(self.num_maps, *x.shape)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time; the last tap weighs the current step.

    Args:
        width: number of channels.
        kernel_size: steps seen, the current one included.
        identity: start as the current step alone; else at random.
    """

    def __init__(self, width: int, kernel_size: int, *, identity: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel_size))
        self.bias = nn.Parameter(torch.empty(width))
        bound = 1 / math.sqrt(kernel_size)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        if identity:
            with torch.no_grad():
                self.weight.zero_()[:, -1] = 1.0
                self.bias.zero_()

    def forward(self, x: Tensor, window: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], window [B, kernel_size - 1, D], reset bool [B, T] or None -> y [B, T, D], window."""
        y, window = causal_conv(x, self.weight, self.bias, window, reset)
        return y, window


class HeadNorm(nn.Module):
    """Layer norm of every head on its own, with one weight per feature and no bias.

    Args:
        num_heads: number of heads H.
        head_width: features per head D.
        eps: added to the variance.
    """

    def __init__(self, num_heads: int, head_width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H, D] to [..., H * D]."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class GatedFeedForward(nn.Module):
    """Feed-forward network with a GeLU gate (Beck et al. 2024, figure 9).

    Args:
        width: input and output width.
        inner_width: width after the up-projection.
        num_blocks: blocks in the stack, for the init.
        bias: whether the projections have one.
    """

    def __init__(self, width: int, inner_width: int, num_blocks: int, *, bias: bool) -> None:
        super().__init__()
        self.up = Linear(width, 2 * inner_width, bias=bias)
        self.down = Linear(inner_width, width, bias=bias)
        init_small(self.up.weight, width)
        init_wang(self.down.weight, width, num_blocks)
        if bias:
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)  # type: ignore[no-any-return]


def soft_cap(gate: Tensor, cap: float | None) -> Tensor:
    """Squash gate pre-activations into (-cap, cap) with cap * tanh(gate / cap); None leaves them."""
    return gate if cap is None else cap * torch.tanh(gate / cap)
