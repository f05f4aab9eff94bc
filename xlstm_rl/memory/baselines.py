"""Memories to compare with: LSTM, GRU and none, with the interface and the laws of every memory core."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from xlstm_rl.memory.config import check_flag, check_number, check_whole
from xlstm_rl.memory.core import MemoryCore
from xlstm_rl.memory.state import map_leaves, zeros_where


class RNNState(NamedTuple):
    """State of an LSTM; of a GRU, without the cell."""

    hidden: Tensor
    """[B, num_layers, hidden_size]"""
    cell: Tensor
    """[B, num_layers, hidden_size]; [B, 0, hidden_size] for a GRU."""


class TorchRNN(MemoryCore):
    """`torch.nn.LSTM` or `torch.nn.GRU` with episode starts inside the sequence and no loop over time.

    Rows are cut into segments at episode starts and all segments run as one packed sequence.

    Args:
        kind: "lstm" or "gru".
        input_size: features per step.
        hidden_size: units per layer.
        num_layers: stacked layers.
        bias: whether the layers have biases.
        dropout: between the layers, in training mode.
        forget_bias: added to the initial bias of the gate that keeps the memory, the forget gate of an LSTM or the
            update gate of a GRU (Gers et al. 2000; Jozefowicz et al. 2015). 0 is the initialisation of torch, with
            which half of the memory is gone after a step; with 3, what was seen is held for some 20 steps.

    Raises:
        TypeError: a setting is of the wrong kind; the message names it.
        ValueError: a setting has an impossible value; the message names it.
    """

    def __init__(
        self,
        kind: str,
        input_size: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole("hidden_size", hidden_size, 1)
        check_whole("num_layers", num_layers, 1)
        check_flag("bias", bias)
        check_number("dropout", dropout, least=0, below=1)
        self.input_size, self.output_size, self.num_layers = input_size, hidden_size, num_layers
        self.has_cell = kind == "lstm"
        self.rnn: nn.LSTM | nn.GRU = (
            nn.LSTM(input_size, hidden_size, num_layers, bias, batch_first=True, dropout=dropout)
            if self.has_cell
            else nn.GRU(input_size, hidden_size, num_layers, bias, batch_first=True, dropout=dropout)
        )
        check_number("forget_bias", forget_bias)
        if forget_bias:
            self._keep_memory(forget_bias)

    def _keep_memory(self, forget_bias: float) -> None:
        if not self.rnn.bias:
            raise ValueError(f"forget_bias={forget_bias} needs biases: set bias=True or leave it out")
        with torch.no_grad():
            for layer in range(self.num_layers):
                # in torch the gates are in the order i, f, g, o and r, z, n
                getattr(self.rnn, f"bias_ih_l{layer}").view(4 if self.has_cell else 3, -1)[1].add_(forget_bias)

    def initial_state(self, batch_size: int) -> RNNState:
        """The empty state: zeros."""
        return RNNState(
            self._zeros(batch_size, self.num_layers, self.output_size),
            self._zeros(batch_size, self.num_layers if self.has_cell else 0, self.output_size),
        )

    def forward(self, x: Tensor, state: RNNState, reset: Tensor | None = None) -> tuple[Tensor, RNNState]:
        """See `MemoryCore.forward`."""
        B, T = x.shape[:2]
        if T == 0 or B == 0:
            return x.new_zeros(B, T, self.output_size), state
        if reset is not None:
            state = zeros_where(reset[:, 0], state)
        if T == 1 or reset is None:
            y, state = self._run(x, state)
            return y, state
        segments = _Segments(reset)
        packed = PackedSequence(x.flatten(0, 1)[segments.packed_index], segments.batch_sizes)
        y, final = self._run(packed, map_leaves(segments.scatter_first, state))
        unpacked = torch.empty_like(y.data).index_copy(0, segments.packed_index, y.data)
        return unpacked.view(B, T, -1), map_leaves(segments.gather_last, final)

    def _run(self, x: Any, state: RNNState) -> tuple[Any, RNNState]:
        hidden, cell = (leaf.transpose(0, 1).contiguous() for leaf in state)
        if self.has_cell:
            y, (hidden, cell) = self.rnn(x, (hidden, cell))
        else:
            y, hidden = self.rnn(x, hidden)
        return y, RNNState(hidden.transpose(0, 1), cell.transpose(0, 1))


class _Segments:
    """Where the segments of a batch of rows cut at episode starts lie in a packed sequence.

    Args:
        reset: bool [B, T]; the first step of a row begins a segment in any case.
    """

    def __init__(self, reset: Tensor) -> None:
        B, T = reset.shape
        starts = reset.clone()
        starts[:, 0] = True
        segment = starts.flatten().cumsum(0) - 1  # [B * T]
        first_step = starts.flatten().nonzero().squeeze(1)  # [S]
        position = torch.arange(B * T, device=reset.device) - first_step[segment]
        lengths = torch.bincount(segment)
        order = lengths.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=reset.device)
        self.num_segments = len(order)
        self.packed_index = (position * self.num_segments + rank[segment]).argsort()
        self.batch_sizes = torch.bincount(position).cpu()
        row_start = torch.arange(B, device=reset.device) * T
        self.first_of_row = rank[segment[row_start]]
        self.last_of_row = rank[segment[row_start + T - 1]]

    def scatter_first(self, leaf: Tensor) -> Tensor:
        """[B, ...] state of rows -> [S, ...] state of segments: rows' first segments carry it, others are empty."""
        return leaf.new_zeros(self.num_segments, *leaf.shape[1:]).index_copy(0, self.first_of_row, leaf)

    def gather_last(self, leaf: Tensor) -> Tensor:
        """[S, ...] final state of segments -> [B, ...] final state of rows."""
        return leaf[self.last_of_row]


class EmptyState(NamedTuple):
    """State of a memoryless core."""

    nothing: Tensor
    """[B, 0]"""


class Memoryless(MemoryCore):
    """No memory: every step is mapped on its own through one hidden layer.

    Args:
        input_size: features per step.
        hidden_size: units of the layer.

    Raises:
        TypeError: `hidden_size` is no whole number.
        ValueError: `hidden_size` is not positive.
    """

    def __init__(self, input_size: int, hidden_size: int = 64) -> None:
        super().__init__()
        check_whole("hidden_size", hidden_size, 1)
        self.input_size, self.output_size = input_size, hidden_size
        self.layer = nn.Sequential(nn.Linear(input_size, hidden_size), nn.Tanh())

    def initial_state(self, batch_size: int) -> EmptyState:
        """A state without numbers."""
        return EmptyState(self._zeros(batch_size, 0))

    def forward(self, x: Tensor, state: EmptyState, reset: Tensor | None = None) -> tuple[Tensor, EmptyState]:
        """See `MemoryCore.forward`."""
        return self.layer(x), state
