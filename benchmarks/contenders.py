"""What `benchmarks.layers` compares: memories of this library, `torch.nn.LSTM`, NX-AI's `xlstm` and `mlstm_kernels`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlstm_rl import make_memory
from xlstm_rl.kernels import backends, mlstm_sequence, slstm_sequence, why_not

HEADS = 4
LSTM = "nn.LSTM"
BACKENDS = [name for name in backends() if name != "reference" and why_not(name, torch.zeros(1)) is None]

Run = Callable[[], Any]


class MLSTMLayer(nn.Module):
    """Projection to q, k, v and gates, then the cell; with `gated` an output gate as nn.LSTM has one."""

    def __init__(self, width: int, backend: str, *, gated: bool = False) -> None:
        super().__init__()
        self.backend = backend
        self.sizes = (*[width] * (4 if gated else 3), HEADS, HEADS)
        self.projection = nn.Linear(width, sum(self.sizes))
        with torch.no_grad():
            self.projection.bias[-HEADS:] += 4.0

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        q, k, v, *output_gate, input_gate, forget_gate = self.projection(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (q, k, v))
        hidden, _ = mlstm_sequence(q, k, v, input_gate, forget_gate, None, reset, backend=self.backend)
        hidden = hidden.flatten(-2)
        return hidden * torch.sigmoid(output_gate[0]) if output_gate else hidden


class ProjectionLayer(nn.Module):
    """The projection of the mLSTM layers alone: what every one of them takes, whatever its cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = MLSTMLayer(width, "none")

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        q, k, v, *_ = self.layer.projection(x).split(self.layer.sizes, -1)
        return q + k + v  # type: ignore[no-any-return]


class SLSTMLayer(nn.Module):
    """Projection to the four gates, then the cell."""

    def __init__(self, width: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.projection = nn.Linear(width, 4 * width)
        self.recurrent = nn.Parameter(torch.randn(4, HEADS, width // HEADS, width // HEADS) / width)

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        gates = self.projection(x).unflatten(-1, (4, HEADS, -1))
        return slstm_sequence(gates, self.recurrent, None, reset, backend=self.backend)[0].flatten(-2)


class NXAIMLSTMLayer(nn.Module):
    """The same projection before the parallel form of `xlstm`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = MLSTMLayer(width, "none")

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

        *qkv, input_gate, forget_gate = self.layer.projection(x).split(self.layer.sizes, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        gates = (gate.transpose(1, 2)[..., None] for gate in (input_gate, forget_gate))
        hidden: Tensor = parallel_stabilized_simple(q, k, v, *gates)
        return hidden.transpose(1, 2).flatten(-2)


class NXAISLSTMLayer(nn.Module):
    """The same projection before the vanilla cell of `xlstm`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        self.projection = nn.Linear(width, 4 * width)
        config = sLSTMCellConfig(hidden_size=width, num_heads=HEADS, backend="vanilla", dtype="float32")
        self.cell = sLSTMCell(config)

    def forward(self, x: Tensor, reset: Tensor) -> Any:
        return self.cell(self.projection(x))[0]


class Block(nn.Module):
    """A block of this library on its own, from an empty memory on."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        memory: Any = make_memory("xlstm", width, defaults="paper", hidden_size=width, blocks=kind, num_heads=HEADS)
        self.block = memory.blocks[0]

    def forward(self, x: Tensor, reset: Tensor) -> Any:
        return self.block(x, self.block.initial_state(len(x)), reset)[0]


class NXAIBlock(nn.Module):
    """A block of `xlstm`, which knows no episode starts."""

    def __init__(self, width: int, kind: str, context_length: int) -> None:
        super().__init__()
        self.block = _nxai_block(width, kind, context_length)

    def forward(self, x: Tensor, reset: Tensor) -> Any:
        return self.block(x)


class MLSTMKernelsLayer(nn.Module):
    """The same projection before the chunkwise form in torch operations of `mlstm_kernels`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = MLSTMLayer(width, "none")

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd

        *qkv, input_gate, forget_gate = self.layer.projection(x).split(self.layer.sizes, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        gates = (gate.transpose(1, 2) for gate in (input_gate, forget_gate))
        hidden: Tensor = mlstm_chunkwise__native_autograd(q, k, v, *gates, chunk_size=min(64, x.shape[1]))
        return hidden.transpose(1, 2).flatten(-2)


class Training(NamedTuple):
    """Forward and backward of a layer on one batch; calling it runs both."""

    forward: Callable[[], Tensor]
    sources: list[Tensor]
    """The input and the parameters."""
    weight: Tensor

    def __call__(self) -> None:
        """Run forward and backward."""
        output = self.forward()
        torch.autograd.grad(output, self.sources, self.weight, allow_unused=True)


def layer_contenders(B: int, T: int, width: int, *, longest_parallel: int = 1024) -> dict[str, Training]:
    """Training of projection and cell, by label; the parallel form up to a length, as its memory grows with T^2."""
    layers: dict[str, nn.Module] = {f"mLSTM {BACKENDS[0]}, output gate": MLSTMLayer(width, BACKENDS[0], gated=True)}
    layers["projection of mLSTM layers alone"] = ProjectionLayer(width)
    for backend in BACKENDS:
        layers[f"mLSTM {backend}"] = MLSTMLayer(width, backend)
        layers[f"sLSTM {backend}"] = SLSTMLayer(width, backend)
    if _installed("xlstm"):
        if longest_parallel >= T:
            layers["NX-AI mLSTM parallel"] = NXAIMLSTMLayer(width)
        layers["NX-AI sLSTM vanilla"] = NXAISLSTMLayer(width)
    if _installed("mlstm_kernels"):
        layers["mlstm_kernels chunkwise"] = MLSTMKernelsLayer(width)
    return _trainings(B, T, width, layers)


def block_contenders(B: int, T: int, width: int) -> dict[str, Training]:
    """Training of whole residual blocks, by label."""
    layers: dict[str, nn.Module] = {}
    for kind, label in (("m", "mLSTM block"), ("s", "sLSTM block")):
        layers[label] = Block(width, kind)
        if _installed("xlstm"):
            layers[f"NX-AI {label}"] = NXAIBlock(width, kind, T)
    return _trainings(B, T, width, layers)


def _trainings(B: int, T: int, width: int, layers: dict[str, nn.Module]) -> dict[str, Training]:
    """nn.LSTM and the layers, each called with x [B, T, width] and episode starts every 64 steps on average."""
    x = torch.randn(B, T, width, requires_grad=True)
    reset, weight = torch.rand(B, T) < 1 / 64, torch.randn(B, T, width)
    lstm = nn.LSTM(width, width, batch_first=True)
    trainings = {LSTM: Training(lambda: lstm(x)[0], [x, *lstm.parameters()], weight)}
    for label, layer in layers.items():
        forward = lambda layer=layer: layer(x, reset).reshape(weight.shape)  # noqa: E731
        trainings[label] = Training(forward, [x, *layer.parameters()], weight)
    return trainings


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def step_contenders(B: int, width: int) -> dict[str, Run]:
    """One step of every block without gradients, by label."""
    x, reset = torch.randn(B, 1, width), torch.zeros(B, dtype=torch.bool)
    row = x[:, 0]
    lstm = nn.LSTM(width, width, batch_first=True)
    carried = (torch.randn(1, B, width), torch.randn(1, B, width))
    runs: dict[str, Run] = {LSTM: lambda: lstm(x, carried)}
    for kind, label in (("m", "mLSTM block"), ("s", "sLSTM block")):
        memory: Any = make_memory("xlstm", width, defaults="paper", hidden_size=width, blocks=kind, num_heads=HEADS)
        state = memory(torch.randn(B, 3, width), memory.initial_state(B))[1]
        block, block_state = memory.blocks[0], state[0]
        runs[f"{label}, old state kept"] = lambda block=block, state=block_state: block.step(row, state, reset)  # type: ignore[misc]
        # as rollouts step
        runs[label] = lambda block=block, state=block_state: block.step(row, state, reset, reuse_state=True)  # type: ignore[misc]
        runs[f"{label}, core.step"] = lambda memory=memory, state=state: memory.step(row, state, reset)  # type: ignore[misc]
    if _installed("xlstm"):
        for kind, label in (("m", "NX-AI mLSTM block"), ("s", "NX-AI sLSTM block")):
            block = _nxai_block(width, kind)
            _, state = block.step(x)
            runs[label] = lambda block=block, state=state: block.step(x, **state)  # type: ignore[misc]
    return runs


def _nxai_block(width: int, kind: str, context_length: int = 64) -> Any:
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.blocks.slstm.block import sLSTMBlockConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig
    from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=HEADS)),
        slstm_block=sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(num_heads=HEADS, backend="vanilla", dtype="float32"),
            feedforward=FeedForwardConfig(proj_factor=4 / 3),
        ),
        num_blocks=1,
        embedding_dim=width,
        context_length=context_length,
        slstm_at=[0] if kind == "s" else [],
    )
    return xLSTMBlockStack(config).blocks[0]
