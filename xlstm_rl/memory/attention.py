"""Causal attention over a sliding window of cached keys and values, with GTrXL's gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.kernels.spoilt import spoil
from xlstm_rl.kernels.states import zero_where
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.core import MemoryBlock


class AttentionCache(NamedTuple):
    """What a layer attends to besides the current step, oldest first."""

    keys: Tensor
    """[B, window, width]"""
    values: Tensor
    """[B, window, width]"""
    seen: Tensor
    """[B, window], one where an entry belongs to the running episode, else zero."""


class AttentionBlock(MemoryBlock):
    """Causal self-attention over the last `window` steps of the episode (Parisotto et al. 2020, GTrXL).

    As in GTrXL, norms come before the sublayers, whose outputs are rectified, and gates like those of a GRU, which
    start open to the residual stream, replace the sums. Distances enter as a learnt bias per head. What is cached are
    keys and values, not layer inputs, and no gradient is stopped.

    Args:
        width: of input and output, a multiple of `num_heads`.
        num_heads: heads.
        window: earlier steps that are attended to.
        ffn_width: inner width of the feed-forward network.
        gate_bias: initial bias of the gates towards the residual stream.
    """

    def __init__(self, width: int, num_heads: int, window: int, ffn_width: int, gate_bias: float = 2.0) -> None:
        super().__init__()
        self.num_heads, self.window, self.width = num_heads, window, width
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, window + 1))
        self.output = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))
        self.attention_gate, self.ffn_gate = _Gate(width, gate_bias), _Gate(width, gate_bias)

    def initial_state(self, batch_size: int) -> AttentionCache:
        """An empty cache: zeros."""
        zeros = self.distance_bias.new_zeros
        shape = (batch_size, self.window, self.width)
        return AttentionCache(zeros(shape), zeros(shape), zeros(batch_size, self.window))

    def forward(self, x: Tensor, state: AttentionCache, reset: Tensor | None = None) -> tuple[Tensor, AttentionCache]:
        """See `MemoryBlock.forward`."""
        T = x.shape[1]
        if reset is None:
            reset = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        episode = reset.cumsum(1)  # [B, T], zero is the episode of the cache
        query, key, value = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        known = state.seen > 0
        # entries of no episode may hold anything; -1 is the episode of none
        keys = torch.cat((zero_where(~known, state.keys), key), 1)  # [B, window + T, width]
        values = torch.cat((zero_where(~known, state.values), value), 1)
        entries = torch.cat((known.to(episode.dtype) - 1, episode), 1)  # [B, window + T]
        attended, spoilt = self._attend(query, keys, values, episode, entries)
        x = self.attention_gate(x, F.relu(self.output(attended)))
        x = spoil(spoilt, self.ffn_gate(x, F.relu(self.ffn(self.ffn_norm(x)))))
        if T == 0:
            return x, state
        seen = entries[:, T:] == episode[:, -1:]
        kept = [zero_where(~seen, part[:, T:]) for part in (keys, values)]
        return x, AttentionCache(kept[0], kept[1], seen.to(x.dtype))

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, episode: Tensor, entries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What was read, [B, T, width], and which steps would have read what is not finite, bool [B, T]."""
        T, total = query.shape[1], keys.shape[1]
        step = torch.arange(T, device=query.device)[:, None] + self.window
        distance = step - torch.arange(total, device=query.device)  # [T, window + T]
        near = (distance >= 0) & (distance <= self.window)
        allowed = near & (entries[:, None, :] == episode[..., None])  # [B, T, window + T]
        # Masked weights are zero, and zero times NaN is NaN, in gradients too: only finite numbers are attended to.
        bad = ~(keys.isfinite().all(-1) & values.isfinite().all(-1))  # [B, window + T]
        bad_query = ~query.isfinite().all(-1)
        spoilt = (allowed & bad[:, None]).any(-1) | bad_query  # [B, T]
        query, keys, values = zero_where(bad_query, query), zero_where(bad, keys), zero_where(bad, values)
        bias = self.distance_bias[:, distance.clamp(0, self.window)]  # [H, T, window + T]
        bias = bias.masked_fill(~allowed[:, None], -torch.inf)  # [B, H, T, window + T]
        heads = (self.num_heads, query.shape[-1] // self.num_heads)
        q, k, v = (part.view(*part.shape[:2], *heads).transpose(1, 2) for part in (query, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(-2)
        return zero_where(spoilt, attended), spoilt


def attention_block(config: XLSTMConfig, index: int) -> AttentionBlock:
    """The block of the letter "a"."""
    return AttentionBlock(config.hidden_size, config.num_heads, config.attention_window, 2 * config.hidden_size)


class _Gate(nn.Module):
    """Joins a sublayer's output y to the residual stream x like a GRU (Parisotto et al. 2020, section 3.2)."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.of_output = nn.Linear(width, 3 * width, bias=False)
        self.of_stream = nn.Linear(width, 2 * width, bias=False)
        self.of_candidate = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.full((width,), bias))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [..., width] -> [..., width]."""
        reset, update, candidate = self.of_output(y).chunk(3, dim=-1)
        reset_x, update_x = self.of_stream(x).chunk(2, dim=-1)
        update = torch.sigmoid(update + update_x - self.bias)
        candidate = torch.tanh(candidate + self.of_candidate(torch.sigmoid(reset + reset_x) * x))
        return (1 - update) * x + update * candidate
