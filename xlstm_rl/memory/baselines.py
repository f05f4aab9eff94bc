"""Memories to compare with, with the interface and the laws of every memory core."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from xlstm_rl.memory.attention import AttentionBlock
from xlstm_rl.memory.config import check_flag, check_number, check_pair, check_whole
from xlstm_rl.memory.core import MemoryCore
from xlstm_rl.memory.fast import is_bare, stands_for
from xlstm_rl.memory.linear_recurrent import RWKV_FFN_FACTOR, RWKVBlock, StateSpaceBlock
from xlstm_rl.memory.state import contained, map_leaves, zeros_where
from xlstm_rl.memory.xlstm import Stack


class RNNState(NamedTuple):
    """State of an LSTM; of a GRU, without the cell."""

    hidden: Tensor
    """[B, num_layers, hidden_size]"""
    cell: Tensor
    """[B, num_layers, hidden_size]; [B, 0, hidden_size] for a GRU."""


class TorchRNN(MemoryCore):
    """`torch.nn.LSTM` or `torch.nn.GRU` with episode starts inside the sequence and no loop over time.

    Rows are cut into segments at episode starts, and all segments run side by side.

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
        if 0 in x.shape[:2]:
            return x.new_zeros(*x.shape[:2], self.output_size), state
        return contained(self._run, x, state, reset)

    def _run(self, x: Tensor, state: RNNState, reset: Tensor | None) -> tuple[Tensor, RNNState]:
        if reset is not None:
            state = zeros_where(reset[:, 0], state)
        if x.shape[1] == 1 or reset is None:
            return self._run_rows(x, state)
        segments = _Segments(reset)
        # what is added to the layer of torch acts on a call of it alone; oneDNN has no GRU
        padded = self.has_cell and x.is_cpu and is_bare(self.rnn) and not torch.is_autocast_enabled("cpu")
        run = self._run_padded if padded else self._run_packed
        y, final = run(x.flatten(0, 1), map_leaves(segments.scatter_first, state), segments)
        return y.view(*x.shape[:2], -1), map_leaves(segments.gather_last, final)

    def _run_rows(self, x: Any, state: RNNState) -> tuple[Any, RNNState]:
        """Whole rows [B, T, F], or a packed sequence."""
        hidden, cell = (leaf.transpose(0, 1).contiguous() for leaf in state)
        if self.has_cell:
            y, (hidden, cell) = self.rnn(x, (hidden, cell))
        else:
            y, hidden = self.rnn(x, hidden)
        return y, RNNState(hidden.transpose(0, 1), cell.transpose(0, 1))

    def _run_packed(self, x: Tensor, state: RNNState, segments: _Segments) -> tuple[Tensor, RNNState]:
        """All segments as one packed sequence: x [B * T, F] and the state before each segment -> the same after."""
        index, batch_sizes = segments.packed()
        y, final = self._run_rows(PackedSequence(x[index], batch_sizes), state)
        return torch.empty_like(y.data).index_copy(0, index, y.data), final

    def _run_padded(self, x: Tensor, state: RNNState, segments: _Segments) -> tuple[Tensor, RNNState]:
        """As `_run_packed` for an LSTM, padded to a common length in one or two groups.

        On a CPU it is two to five times as fast: torch runs packed sequences step by step there, and padded ones by
        oneDNN.
        """
        outputs, finals, members = [], [], []
        for first, last in segments.groups():
            group = segments.padded(first, last)
            shape = (group.length, last - first, -1)
            padded = x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, group.places, x[group.steps])
            padding = x.new_ones(shape[0] * shape[1], 1).index_fill(0, group.places, 0.0)
            before = map_leaves(lambda leaf, rows=slice(first, last): leaf[rows], state)
            y, final = self._run_holding(padded.view(shape), padding.view(shape), before)
            outputs.append(y.flatten(0, 1)[group.places])
            finals.append(final)
            members.append(group.steps)
        y = torch.cat(outputs)
        final = map_leaves(lambda *parts: torch.cat(parts), *finals)
        return torch.empty_like(y).index_copy(0, torch.cat(members), y), final

    def _run_holding(self, x: Tensor, padding: Tensor, state: RNNState) -> tuple[Tensor, RNNState]:
        """Run x [T, B, F] so that the cells stay as they are where `padding` [T, B, 1] is one.

        Padding is one more input, with weights that shut the input gate and open the forget gate exactly: sigmoids of
        so large numbers are 0 and 1. Of the hidden states the last before the padding is taken.
        """
        count = padding.shape[1]
        last_step = (padding == 0).sum(0).squeeze(1) - 1  # [B]
        # in torch the gates are in the order i, f, g, o
        hold = x.new_tensor((-_SURE, _SURE, 0.0, 0.0)).repeat_interleave(self.output_size).unsqueeze(1)
        hiddens, cells = [], []
        for layer, (input_weight, *others) in enumerate(self.rnn.all_weights):
            weights: list[Tensor] = [torch.cat((input_weight, hold), 1), *others]
            before = tuple(leaf[None, :, layer].contiguous() for leaf in state)
            options = (self.rnn.bias, 1, 0.0, self.training, False, False)
            x, _, cell = torch.lstm(torch.cat((x, padding), 2), before, weights, *options)
            hiddens.append(x[last_step, torch.arange(count)])
            cells.append(cell[0])
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.rnn.dropout, self.training)
        return x, RNNState(torch.stack(hiddens, 1), torch.stack(cells, 1))


# sigmoid(-1e4) is zero in every precision.
_SURE = 1e4


class _Group(NamedTuple):
    """Segments padded to the length of the longest."""

    length: int
    steps: Tensor
    """[N] (int64), places of their steps in [B * T]."""
    places: Tensor
    """[N] (int64), places of the same in [length * segments]."""


class _Segments:
    """The rows of a batch cut at episode starts: segments, numbered from the longest to the shortest.

    Args:
        reset: bool [B, T]; the first step of a row begins a segment in any case.
    """

    def __init__(self, reset: Tensor) -> None:
        B, T = reset.shape
        starts = reset.clone()
        starts[:, 0] = True
        found = starts.flatten().cumsum(0) - 1  # [B * T], the segment of every step in the order of time
        first_step = starts.flatten().nonzero().squeeze(1)  # [S]
        lengths = torch.bincount(found)
        order = lengths.argsort(descending=True, stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=reset.device)
        self.lengths = lengths[order]
        self.segment = number[found]  # [B * T]
        self.position = torch.arange(B * T, device=reset.device) - first_step[found]  # [B * T], in its segment
        row_start = torch.arange(B, device=reset.device) * T
        self.first_of_row = self.segment[row_start]
        self.last_of_row = self.segment[row_start + T - 1]

    def scatter_first(self, leaf: Tensor) -> Tensor:
        """[B, ...] state of rows -> [S, ...] state of segments: rows' first segments carry it, others are empty."""
        return leaf.new_zeros(len(self.lengths), *leaf.shape[1:]).index_copy(0, self.first_of_row, leaf)

    def gather_last(self, leaf: Tensor) -> Tensor:
        """[S, ...] final state of segments -> [B, ...] final state of rows."""
        return leaf[self.last_of_row]

    def packed(self) -> tuple[Tensor, Tensor]:
        """Order of the steps [B * T] in a packed sequence, and how many segments have each of its steps [T]."""
        order = (self.position * len(self.lengths) + self.segment).argsort()
        return order, torch.bincount(self.position).cpu()

    def groups(self) -> list[tuple[int, int]]:
        """Segments from and to (exclusive) of the one or two groups that take least time when padded.

        In measured units a step of a group costs two and one for every segment, and a further group 150.
        """
        S = len(self.lengths)
        if S < 3:
            return [(0, S)]
        lengths = self.lengths.double()
        first = torch.arange(1, S)  # how many segments the group of the longer ones has
        cost, at = (lengths[0] * (first + 2) + lengths[1:] * (S - first + 2) + 150).min(0)
        if float(cost) >= float(lengths[0]) * (S + 2):
            return [(0, S)]
        return [(0, int(at) + 1), (int(at) + 1, S)]

    def padded(self, first: int, last: int) -> _Group:
        """Segments `first` to `last` (exclusive) side by side, time in front."""
        steps = ((self.segment >= first) & (self.segment < last)).nonzero().squeeze(1)
        places = self.position[steps] * (last - first) + self.segment[steps] - first
        return _Group(int(self.lengths[first]), steps, places)


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


class Frames(NamedTuple):
    """State of a frame stack."""

    past: Tensor
    """The last inputs, [B, num_frames - 1, input_size], oldest first."""


class FrameStack(MemoryCore):
    """The last `num_frames` inputs of the episode through one hidden layer; earlier ones are zeros.

    Args:
        input_size: features per step.
        hidden_size: units of the layer.
        num_frames: steps seen, the current one included.

    Raises:
        TypeError: a setting is no whole number.
        ValueError: a setting is not positive.
    """

    def __init__(self, input_size: int, hidden_size: int = 64, num_frames: int = 4) -> None:
        super().__init__()
        check_whole("hidden_size", hidden_size, 1)
        check_whole("num_frames", num_frames, 1)
        self.input_size, self.output_size, self.num_frames = input_size, hidden_size, num_frames
        self.layer = nn.Sequential(nn.Linear(num_frames * input_size, hidden_size), nn.Tanh())

    def initial_state(self, batch_size: int) -> Frames:
        """Zeros."""
        return Frames(self._zeros(batch_size, self.num_frames - 1, self.input_size))

    def forward(self, x: Tensor, state: Frames, reset: Tensor | None = None) -> tuple[Tensor, Frames]:
        """See `MemoryCore.forward`."""
        past = self.num_frames - 1
        B, T = x.shape[:2]
        if T == 0:
            return x.new_zeros(B, 0, self.output_size), state
        if reset is None:
            reset = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        frames = torch.cat((state.past, x), 1)  # [B, past + T, input_size]
        episode = torch.cat((torch.zeros_like(reset[:, :1]).expand(-1, past), reset), 1).cumsum(1)
        same = episode.unfold(1, past + 1, 1) == episode[:, past:, None]  # [B, T, num_frames]
        stacked = frames.unfold(1, past + 1, 1).transpose(2, 3).masked_fill(~same[..., None], 0.0)
        kept = frames[:, T:].masked_fill((episode[:, T:] != episode[:, -1:])[..., None], 0.0)
        return self.layer(stacked.flatten(2)), Frames(kept)


@stands_for
class Transformer(Stack):
    """Attention blocks: all that the last `window` steps of the episode hold (Parisotto et al. 2020, GTrXL).

    Args:
        input_size: features per step.
        hidden_size: width, a multiple of `num_heads`.
        num_layers: blocks; what is remembered reaches back up to `num_layers * window` steps.
        num_heads: heads of every block.
        window: earlier steps that a block attends to.
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
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("num_heads", num_heads)):
            check_whole(name, value, 1)
        check_whole("window", window, 1)
        check_number("ffn_factor", ffn_factor, above=0)
        check_number("gate_bias", gate_bias)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads}")
        ffn_width = round(ffn_factor * hidden_size)
        blocks = (AttentionBlock(hidden_size, num_heads, window, ffn_width, gate_bias) for _ in range(num_layers))
        super().__init__(input_size, hidden_size, blocks)
        self._register_load_state_dict_pre_hook(_take_layers_for_blocks)  # type: ignore[no-untyped-call]


def _take_layers_for_blocks(weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights of transformers that were saved before they were stacks of blocks."""
    for name in [name for name in weights if name.startswith(f"{prefix}layers.")]:
        weights[f"{prefix}blocks.{name.removeprefix(f'{prefix}layers.')}"] = weights.pop(name)


@stands_for
class StateSpace(Stack):
    """Selective diagonal state-space blocks (Gu and Dao 2023, Mamba, section 3).

    Args:
        input_size: features per step.
        hidden_size: width of the residual stream and of the output.
        num_layers: blocks.
        num_states: states per inner feature, the N of the paper.
        proj_factor: inner width over `hidden_size`.
        conv_kernel: steps seen by the causal convolution, the current one included.
        delta_range: initial step sizes are spread log-uniformly between these two, hence time constants between 1 / the
            second and 1 / the first number in steps.

    Raises:
        TypeError: a setting is of the wrong kind; the message names it.
        ValueError: a setting has an impossible value; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        num_states: int = 8,
        proj_factor: float = 2.0,
        conv_kernel: int = 4,
        delta_range: tuple[float, float] = (0.001, 0.1),
    ) -> None:
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_states": num_states}
        for name, value in (sizes | {"conv_kernel": conv_kernel}).items():
            check_whole(name, value, 1)
        check_number("proj_factor", proj_factor, above=0)
        # YAML has lists only
        delta_range = tuple(delta_range) if isinstance(delta_range, list) else delta_range
        check_pair("delta_range", delta_range)
        low, high = delta_range
        check_number("delta_range", low, above=0)
        check_number("delta_range", high, least=low)
        blocks = (
            StateSpaceBlock(hidden_size, proj_factor, num_states, conv_kernel, delta_range) for _ in range(num_layers)
        )
        super().__init__(input_size, hidden_size, blocks, post_norm=nn.RMSNorm(hidden_size))


@stands_for
class RWKV(Stack):
    """RWKV-4 blocks (Peng et al. 2023): averages whose weights decay at a learnt rate, whatever the input.

    Args:
        input_size: features per step.
        hidden_size: width of the residual stream and of the output.
        num_layers: blocks.
        ffn_factor: inner width of the channel mixing over `hidden_size`.

    Raises:
        TypeError: a setting is of the wrong kind; the message names it.
        ValueError: a setting has an impossible value; the message names it.
    """

    def __init__(
        self, input_size: int, hidden_size: int = 64, num_layers: int = 1, ffn_factor: float = RWKV_FFN_FACTOR
    ) -> None:
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            check_whole(name, value, 1)
        check_number("ffn_factor", ffn_factor, above=0)
        blocks = (RWKVBlock(hidden_size, ffn_factor, index, num_layers) for index in range(num_layers))
        super().__init__(input_size, hidden_size, blocks, post_norm=nn.LayerNorm(hidden_size))
