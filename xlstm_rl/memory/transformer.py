"""A causal Transformer over a sliding window of cached keys and values, with GTrXL's gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_rl.memory.config import check_number, check_whole
from xlstm_rl.memory.core import MemoryCore


class AttentionCache(NamedTuple):
    """What a layer attends to besides the current step, oldest first."""

    keys: Tensor
    """[B, window, hidden_size]"""
    values: Tensor
    """[B, window, hidden_size]"""
    seen: Tensor
    """[B, window], one where an entry belongs to the running episode, else zero."""


class Transformer(MemoryCore):
    """Causal self-attention over the last `window` steps of the episode (Parisotto et al. 2020, GTrXL).

    As in GTrXL, norms come before the sublayers, whose outputs are rectified, and gates like those of a GRU, which
    start open to the residual stream, replace the sums. Distances enter as a learnt bias per head. What is cached are
    keys and values, not layer inputs, and no gradient is stopped.

    Args:
        input_size: features per step.
        hidden_size: width, a multiple of `num_heads`.
        num_layers: attention layers; what is remembered reaches back up to `num_layers * window` steps.
        num_heads: heads of every layer.
        window: earlier steps that a layer attends to.
        ffn_factor: inner width of the feed-forward networks over `hidden_size`.
        gate_bias: initial bias of the gates towards the residual stream.

    Raises:
        TypeError: a setting is of the wrong kind; the message names it.
        ValueError: a setting has an impossible value; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        num_heads: int = 4,
        window: int = 64,
        ffn_factor: float = 2.0,
        gate_bias: float = 2.0,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("num_heads", num_heads)):
            check_whole(name, value, 1)
        check_whole("window", window, 1)
        check_number("ffn_factor", ffn_factor, above=0)
        check_number("gate_bias", gate_bias)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}")
        self.input_size, self.output_size, self.window = input_size, hidden_size, window
        self.input_projection = nn.Linear(input_size, hidden_size)
        self.layers = nn.ModuleList(
            _Layer(hidden_size, num_heads, window, round(ffn_factor * hidden_size), gate_bias)
            for _ in range(num_layers)
        )

    def initial_state(self, batch_size: int) -> tuple[AttentionCache, ...]:
        """Empty caches: zeros."""
        shape = (batch_size, self.window, self.output_size)
        return tuple(
            AttentionCache(self._zeros(*shape), self._zeros(*shape), self._zeros(batch_size, self.window))
            for _ in self.layers
        )

    def forward(
        self, x: Tensor, state: tuple[AttentionCache, ...], reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[AttentionCache, ...]]:
        """See `MemoryCore.forward`."""
        if reset is None:
            reset = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        episode = reset.cumsum(1)  # [B, T], zero is the episode of the cache
        x = self.input_projection(x)
        caches = []
        for layer, cache in zip(self.layers, state, strict=True):
            x, cache = layer(x, cache, episode)
            caches.append(cache)
        return x, tuple(caches)


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, window: int, ffn_width: int, gate_bias: float) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, window + 1))
        self.output = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))
        self.attention_gate, self.ffn_gate = _Gate(width, gate_bias), _Gate(width, gate_bias)

    def forward(self, x: Tensor, cache: AttentionCache, episode: Tensor) -> tuple[Tensor, AttentionCache]:
        """x [B, T, width], episode [B, T] counted from the one of the cache -> [B, T, width], cache."""
        T = x.shape[1]
        query, key, value = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        known = cache.seen > 0
        # entries of no episode may hold anything; -1 is the episode of none
        keys = torch.cat((cache.keys.masked_fill(~known[..., None], 0.0), key), 1)  # [B, window + T, width]
        values = torch.cat((cache.values.masked_fill(~known[..., None], 0.0), value), 1)
        entries = torch.cat((known.to(episode.dtype) - 1, episode), 1)  # [B, window + T]
        attended = self._attend(query, keys, values, episode, entries)
        x = self.attention_gate(x, F.relu(self.output(attended)))
        x = self.ffn_gate(x, F.relu(self.ffn(self.ffn_norm(x))))
        if T == 0:
            return x, cache
        seen = entries[:, T:] == episode[:, -1:]
        kept = [part[:, T:].masked_fill(~seen[..., None], 0.0) for part in (keys, values)]
        return x, AttentionCache(kept[0], kept[1], seen.to(x.dtype))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, episode: Tensor, entries: Tensor) -> Tensor:
        T, total = query.shape[1], keys.shape[1]
        step = torch.arange(T, device=query.device)[:, None] + self.window
        distance = step - torch.arange(total, device=query.device)  # [T, window + T]
        near = (distance >= 0) & (distance <= self.window)
        allowed = near & (entries[:, None, :] == episode[..., None])  # [B, T, window + T]
        bias = self.distance_bias[:, distance.clamp(0, self.window)]  # [H, T, window + T]
        bias = bias.masked_fill(~allowed[:, None], -torch.inf)  # [B, H, T, window + T]
        heads = (self.num_heads, query.shape[-1] // self.num_heads)
        q, k, v = (part.view(*part.shape[:2], *heads).transpose(1, 2) for part in (query, keys, values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(-2)


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
