"""Speed of the memories against `torch.nn.LSTM`, NX-AI's `xlstm` and `mlstm_kernels`, in one process, interleaved.

    python -m benchmarks.layers                       # all tables, about five minutes
    python -m benchmarks.layers --tables layers step --rounds 9 --json speed.json

`layers`: projection and cell, forward and backward. `blocks`: whole residual blocks, forward and backward.
`step`: one acting step of a block without gradients. `growth`: time (us) and memory (bytes kept for the backward pass)
per step of a layer as the sequence grows, and the size of the state that acting carries.
Medians over rounds; the ratios are to nn.LSTM of the same width. One thread, CPU time. The cells of others know no
episode starts, ours run with them. A contender whose package is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import LSTM, Run, Training, block_contenders, layer_contenders, step_contenders
from xlstm_rl import backend_info, make_memory

LAYERS = ((16, 32, 64), (16, 128, 64), (16, 128, 128), (16, 128, 256), (8, 512, 128), (64, 128, 64))
STEPS = ((1, 64), (8, 64), (16, 64), (64, 64), (1, 128), (16, 128), (64, 128))
GROWTH = (64, 512, 2048, 8192)
TABLES = ("layers", "blocks", "step", "growth")

Medians = dict[str, float]


def medians(runs: Mapping[str, Run | Training], rounds: int, seconds: float) -> Medians:
    """Median time of one call in us; a turn of a contender lasts about `seconds`, whatever it takes."""
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {label: [] for label in runs}
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


def _in_turn(cases: Mapping[str, Mapping[str, Training]], rounds: int, seconds: float) -> dict[str, Medians]:
    """Medians by case and label with all cases in turn, so that what changes meanwhile changes all of them."""
    together = {f"{case}/{label}": run for case, runs in cases.items() for label, run in runs.items()}
    measured = medians(together, rounds, seconds)
    return {case: {label: measured[f"{case}/{label}"] for label in runs} for case, runs in cases.items()}


def kept_bytes(training: Training) -> int:
    """Bytes that one forward pass keeps for its backward pass, input and parameters left out."""
    known = {source.untyped_storage().data_ptr() for source in training.sources}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = training.forward()  # held, or its memory would be counted anew under another address
    del output
    return sum(kept.values())


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
    parser.add_argument("--tables", nargs="+", choices=TABLES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of one turn of one contender")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = args.tables or TABLES
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "machine": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "clock": "process time",
        "backend": backend_info()["cpu"].in_use,
        "versions": {
            name: version(name) for name in ("torch", "xlstm", "mlstm_kernels") if importlib.util.find_spec(name)
        },
        "unit": "us",
    }
    print({key: value for key, value in result.items()})
    for table, contenders in (("layers", layer_contenders), ("blocks", block_contenders)):
        if table in tables:
            rows = {f"B={B} T={T} D={D}": medians(contenders(B, T, D), args.rounds, args.seconds) for B, T, D in LAYERS}
            show(f"{table.capitalize()}, forward and backward", rows)
            result[table] = rows
    if "step" in tables:
        with torch.inference_mode():
            rows = {f"B={B} D={D}": medians(step_contenders(B, D), args.rounds, args.seconds) for B, D in STEPS}
        show("One step without gradients", rows)
        result["step"] = rows
    if "growth" in tables:
        trainings = {T: layer_contenders(1, T, 64) for T in GROWTH}
        times = _in_turn({f"T={T}": trainings[T] for T in GROWTH}, max(3, args.rounds // 2), args.seconds)
        show("Growth with the sequence, B=1 D=64, forward and backward", times, {f"T={T}": T for T in GROWTH})
        kept = {f"T={T}": {label: kept_bytes(run) / T for label, run in trainings[T].items()} for T in GROWTH}
        print("\nBytes per step kept for the backward pass")
        for name, row in kept.items():
            print(name, *(f"\n    {label:28s} {value:11.0f}" for label, value in row.items()))
        memories = {kind: make_memory("xlstm", 64, defaults="paper", blocks=kind) for kind in ("m", "s", "ms")}
        states = {kind: memory.state_size * 4 for kind, memory in memories.items()}
        print(f"\nBytes of the state that acting carries, whatever the length of the episode: {states}")
        result |= {"growth": times, "kept_bytes_per_step": kept, "state_bytes": states}
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
