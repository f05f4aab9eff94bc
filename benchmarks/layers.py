"""Speed of the memories against `torch.nn.LSTM` and NX-AI's `xlstm`, in one process, interleaved.

    python -m benchmarks.layers                       # all three tables, about three minutes
    python -m benchmarks.layers --tables layers step --rounds 9 --json speed.json

`layers`: projection and cell, forward and backward. `step`: one acting step of a block without gradients.
`growth`: time per step of a layer, forward and backward, as the sequence grows, in us.
Medians over rounds; the ratios are to nn.LSTM of the same width. One thread, CPU time. NX-AI's cells know no
episode starts, ours run with them. A contender whose package is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_rl import backend_info, make_memory
from xlstm_rl.kernels import backends, mlstm_sequence, slstm_sequence, why_not

HEADS = 4
LAYERS = ((16, 32, 64), (16, 128, 64), (16, 128, 128), (16, 128, 256), (8, 512, 128), (64, 128, 64))
STEPS = ((1, 64), (8, 64), (16, 64), (64, 64), (1, 128), (16, 128), (64, 128))
GROWTH = (64, 512, 2048, 8192)
LSTM = "nn.LSTM"
BACKENDS = [name for name in backends() if name != "reference" and why_not(name, torch.zeros(1)) is None]

Run = Callable[[], Any]
Medians = dict[str, float]


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


def layer_contenders(B: int, T: int, width: int, *, others: bool) -> dict[str, Run]:
    """Forward and backward of every layer, by label."""
    x = torch.randn(B, T, width, requires_grad=True)
    reset = torch.rand(B, T) < 1 / 64
    lstm = nn.LSTM(width, width, batch_first=True)

    def training(forward: Callable[[], Tensor], parameters: list[Tensor]) -> Run:
        weight = torch.randn(B, T, width)

        def run() -> None:
            output = forward()
            torch.autograd.grad(output, [x, *parameters], weight.view_as(output), allow_unused=True)

        return run

    layers: dict[str, nn.Module] = {}
    layers[f"mLSTM {BACKENDS[0]}, output gate"] = MLSTMLayer(width, BACKENDS[0], gated=True)
    for backend in BACKENDS:
        layers[f"mLSTM {backend}"] = MLSTMLayer(width, backend)
        layers[f"sLSTM {backend}"] = SLSTMLayer(width, backend)
    if others and importlib.util.find_spec("xlstm"):
        layers["NX-AI mLSTM parallel"] = NXAIMLSTMLayer(width)
        layers["NX-AI sLSTM vanilla"] = NXAISLSTMLayer(width)
    runs = {LSTM: training(lambda: lstm(x)[0], list(lstm.parameters()))}
    for label, layer in layers.items():
        runs[label] = training(lambda layer=layer: layer(x, reset), list(layer.parameters()))  # type: ignore[misc]
    return runs


def step_contenders(B: int, width: int) -> dict[str, Run]:
    """One step of every block without gradients, by label."""
    x, reset = torch.randn(B, 1, width), torch.zeros(B, 1, dtype=torch.bool)
    lstm = nn.LSTM(width, width, batch_first=True)
    carried = (torch.randn(1, B, width), torch.randn(1, B, width))
    runs: dict[str, Run] = {LSTM: lambda: lstm(x, carried)}
    for kind, label in (("m", "mLSTM block"), ("s", "sLSTM block")):
        memory: Any = make_memory("xlstm", width, hidden_size=width, blocks=kind, num_heads=HEADS)
        state = memory(torch.randn(B, 3, width), memory.initial_state(B))[1]
        block, block_state = memory.blocks[0], state[0]
        runs[label] = lambda block=block, state=block_state: block(x, state, reset)  # type: ignore[misc]
        runs[f"{label}, core.step"] = lambda memory=memory, state=state: memory.step(x[:, 0], state, reset[:, 0])  # type: ignore[misc]
    if importlib.util.find_spec("xlstm"):
        for kind, label in (("m", "NX-AI mLSTM block"), ("s", "NX-AI sLSTM block")):
            block = _nxai_block(width, kind)
            _, state = block.step(x)
            runs[label] = lambda block=block, state=state: block.step(x, **state)  # type: ignore[misc]
    return runs


def _nxai_block(width: int, kind: str) -> Any:
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
        context_length=64,
        slstm_at=[0] if kind == "s" else [],
    )
    return xLSTMBlockStack(config).blocks[0]


def medians(runs: dict[str, Run], rounds: int, seconds: float) -> Medians:
    """Median time of one call in us; a turn of a contender lasts about `seconds`, whatever it takes."""
    calls, times = {}, {label: [] for label in runs}
    for label, run in runs.items():
        run()
        start = time.process_time()
        run()
        calls[label] = max(1, round(seconds / max(time.process_time() - start, 1e-6)))
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.process_time()
            for _ in range(calls[label]):
                run()
            times[label].append((time.process_time() - start) / calls[label] * 1e6)
    return {label: statistics.median(values) for label, values in times.items()}


def show(title: str, rows: dict[str, Medians], per: dict[str, int] | None = None) -> None:
    """Print a table: a row per case, a column per contender; ratios to nn.LSTM, or times per step."""
    print(f"\n{title}")
    for name, row in rows.items():
        print(f"{name}: {LSTM} {row[LSTM]:.0f} us")
        for label, value in row.items():
            step = f"  {value / per[name]:9.2f} us per step" if per else ""
            print(f"    {label:28s} {value:11.0f} us {value / row[LSTM]:8.2f}x{step}")


def main() -> None:
    """Measure, print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=("layers", "step", "growth"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of one turn of one contender")
    parser.add_argument("--without-others", action="store_true", help="leave NX-AI's cells out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = args.tables or ("layers", "step", "growth")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "machine": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "clock": "process time",
        "backend": backend_info()["cpu"].in_use,
        "versions": {name: version(name) for name in ("torch", "xlstm") if importlib.util.find_spec(name)},
        "unit": "us",
    }
    print({key: value for key, value in result.items()})
    if "layers" in tables:
        rows = {
            f"B={B} T={T} D={D}": medians(
                layer_contenders(B, T, D, others=not args.without_others), args.rounds, args.seconds
            )
            for B, T, D in LAYERS
        }
        show("Layers, forward and backward", rows)
        result["layers"] = rows
    if "step" in tables:
        with torch.inference_mode():
            rows = {f"B={B} D={D}": medians(step_contenders(B, D), args.rounds, args.seconds) for B, D in STEPS}
        show("One step without gradients", rows)
        result["step"] = rows
    if "growth" in tables:
        rows = {
            f"T={T}": medians(layer_contenders(1, T, 64, others=False), max(3, args.rounds // 2), args.seconds)
            for T in GROWTH
        }
        show("Growth with the sequence, B=1 D=64, forward and backward", rows, {f"T={T}": T for T in GROWTH})
        result["growth"] = rows
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
