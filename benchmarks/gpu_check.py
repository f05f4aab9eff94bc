"""Checks the GPU kernels on this machine's GPU and times them; one command for everybody who has one.

    python -m benchmarks.gpu_check                 # correctness against float64, then a table of times
    python -m benchmarks.gpu_check --json gpu.json

Exit code: 0 when everything that can run agrees, 1 when something is wrong, 2 when there is no GPU or no Triton.
Times are medians of CUDA events over interleaved rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_rl.kernels import MLSTMState, SLSTMState, mlstm_sequence, slstm_sequence, why_not

DEVICE = "cuda"
WIDTHS = (16, 32, 64, 128)
# Largest allowed error relative to the largest expected value of a tensor.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# B, T, H, D
SHAPES = ((16, 32, 4, 16), (64, 128, 4, 16), (64, 128, 4, 64), (1024, 128, 4, 64), (64, 128, 4, 128), (1024, 1, 4, 64))


def main() -> int:
    """Check, time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU: torch.cuda.is_available() is false. Nothing was checked and nothing was timed.")
        return 2
    if find_spec("triton") is None:
        print("Triton is not installed (pip install triton). Nothing was checked and nothing was timed.")
        return 2
    triton = import_module("triton")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    errors = check()
    times = [] if any(row["wrong"] for row in errors) else measure(args.rounds)
    if args.json:
        args.json.write_text(json.dumps({**machine, "errors": errors, "times": times}, indent=2) + "\n")
    wrong = sum(row["wrong"] for row in errors)
    print("All kernels agree with float64." if wrong == 0 else f"{wrong} cases are WRONG: please report this output.")
    return 1 if wrong else 0


def check() -> list[dict[str, Any]]:
    """Compare values and gradients of every kernel with the recurrence in float64; a row per case."""
    rows: list[dict[str, Any]] = []
    print(f"\n{'operation':10s} {'width':>5s} {'dtype':9s} {'T':>4s} {'forget':8s} worst error")
    for operation in ("mlstm", "slstm"):
        for D in WIDTHS:
            for dtype in ALLOWED:
                for T, activation in ((1, "sigmoid"), (2, "sigmoid"), (37, "sigmoid"), (37, "exp"), (200, "sigmoid")):
                    row = _check_case(operation, D, dtype, T, activation)
                    rows.append(row)
                    verdict = row["skipped"] or f"{row['error']:.1e}{'  WRONG' if row['wrong'] else ''}"
                    print(f"{operation:10s} {D:5d} {str(dtype)[6:]:9s} {T:4d} {activation:8s} {verdict}")
    return rows


def _check_case(operation: str, D: int, dtype: torch.dtype, T: int, activation: Any) -> dict[str, Any]:
    tensors, state, reset = arguments(operation, 5, T, 2, D, dtype)
    reason = why_not("triton", tensors[0])
    case = {"operation": operation, "width": D, "dtype": str(dtype), "T": T, "forget": activation}
    if reason is not None:
        return {**case, "skipped": reason, "error": None, "wrong": False}
    actual = differentiated(operation, tensors, state, reset, activation, "triton")
    exact = [x.double() for x in tensors], [x.double() for x in state], reset
    expected = differentiated(operation, *exact, activation, "reference")
    error = max(_relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    return {**case, "skipped": "", "error": error, "wrong": not error <= ALLOWED[dtype]}


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1)
    return float(error) if bool(actual.isfinite().all()) else float("inf")


def arguments(
    operation: str, B: int, T: int, H: int, D: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Random inputs, state and resets of a call."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    if operation == "mlstm":
        # Positive queries and keys keep `n . q` away from zero, where rounding errors are divided by nothing.
        inputs = [normal(B, T, H, D).abs() + 0.5, normal(B, T, H, D).abs() + 0.5, normal(B, T, H, D)]
        inputs += [normal(B, T, H), normal(B, T, H) + 3.0]
        state = [normal(B, H, D, D), normal(B, H, D).abs() + 0.5, normal(B, H).abs()]
    else:
        inputs = [normal(B, T, 4, H, D), normal(4, H, D, D) * D**-0.5]
        state = [normal(B, H, D), normal(B, H, D).abs() + 1.0, normal(B, H, D).tanh(), normal(B, H, D)]
    reset = torch.rand(B, T, generator=g, device=DEVICE) < 0.05
    return [x.to(dtype) for x in inputs], state, reset


def call(
    operation: str, tensors: list[Tensor], state: list[Tensor], reset: Tensor, activation: Any, backend: str
) -> tuple[Tensor, MLSTMState | SLSTMState]:
    """One call through the door."""
    options: dict[str, Any] = {"forget_activation": activation, "backend": backend}
    if operation == "mlstm":
        q, k, v, i, f = tensors
        return mlstm_sequence(q, k, v, i, f, MLSTMState(*state), reset, **options)
    return slstm_sequence(tensors[0], tensors[1], SLSTMState(*state), reset, **options)


def differentiated(
    operation: str, tensors: list[Tensor], state: list[Tensor], reset: Tensor, activation: Any, backend: str
) -> list[Tensor]:
    """Outputs, final state, and the gradients of a fixed random linear function of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    state = [*(x.detach().requires_grad_() for x in state[:-1]), state[-1]]
    hidden, last = call(operation, tensors, state, reset, activation, backend)
    outputs = [hidden, *last[:-1]]
    g = torch.Generator(DEVICE).manual_seed(1)
    slopes = [torch.randn(x.shape, generator=g, device=DEVICE).to(x.dtype) for x in outputs]
    # The same numbers for every precision: bfloat16 holds them all.
    slopes = [s.bfloat16().to(s.dtype) for s in slopes]
    gradients = torch.autograd.grad(outputs, [*tensors, *state[:-1]], slopes)
    return [x.detach() for x in (*outputs, *gradients)]


def measure(rounds: int) -> list[dict[str, Any]]:
    """Time forward and backward of all contenders on all shapes; a row per shape and contender."""
    rows: list[dict[str, Any]] = []
    print(f"\n{'B':>5s} {'T':>4s} {'H':>3s} {'D':>4s} {'dtype':9s} {'contender':28s} {'forward':>9s} {'both':>9s}  us")
    for B, T, H, D in SHAPES:
        for dtype in ALLOWED:
            runs = contenders(B, T, H, D, dtype)
            for label, (forward, both) in _interleaved(runs, rounds).items():
                shape = {"B": B, "T": T, "H": H, "D": D, "dtype": str(dtype)[6:], "contender": label}
                rows.append({**shape, "forward_us": forward, "both_us": both})
                print(f"{B:5d} {T:4d} {H:3d} {D:4d} {str(dtype)[6:]:9s} {label:28s} {forward:9.1f} {both:9.1f}")
    return rows


def contenders(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> dict[str, Callable[[bool], None]]:
    """What can be timed here: label and a function that runs it, forward only or with its backward pass."""
    found: dict[str, Callable[[bool], None]] = {}
    for operation in ("mlstm", "slstm"):
        for backend in ("triton", "torch"):
            tensors, state, reset = arguments(operation, B, T, H, D, dtype)
            if why_not(backend, tensors[0]) is None:
                found[f"{operation}, {backend}"] = _sequence(operation, tensors, state, reset, backend)
    found["torch.nn.LSTM (cuDNN)"] = _lstm(B, T, H * D, dtype)
    public = _mlstm_kernels(B, T, H, D, dtype)
    if public is not None:
        found["mlstm_kernels chunkwise"] = public
    return found


def _sequence(
    operation: str, tensors: list[Tensor], state: list[Tensor], reset: Tensor, backend: str
) -> Callable[[bool], None]:
    leaves = [x.requires_grad_() for x in tensors]

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            hidden, _ = call(operation, leaves, state, reset, "sigmoid", backend)
        if backward:
            torch.autograd.grad(hidden, leaves, torch.ones_like(hidden))

    return run


def _lstm(B: int, T: int, width: int, dtype: torch.dtype) -> Callable[[bool], None]:
    layer = torch.nn.LSTM(width, width, batch_first=True, device=DEVICE, dtype=dtype)
    x = torch.randn(B, T, width, device=DEVICE, dtype=dtype, requires_grad=True)

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            y, _ = layer(x)
        if backward:
            torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    return run


def _mlstm_kernels(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Callable[[bool], None] | None:
    if find_spec("mlstm_kernels") is None or T % 64 != 0:
        return None
    kernel = import_module("mlstm_kernels.torch").get_mlstm_kernel("chunkwise--triton_xl_chunk")
    tensors, _, _ = arguments("mlstm", B, T, H, D, dtype)
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in tensors]

    def run(backward: bool) -> None:
        q, k, v, i, f = leaves
        with torch.set_grad_enabled(backward):
            hidden = kernel(q=q, k=k, v=v, i=i, f=f)
        if backward:
            torch.autograd.grad(hidden, leaves, torch.ones_like(hidden))

    return run


def _interleaved(runs: dict[str, Callable[[bool], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median microseconds of forward, and of forward and backward; the first three rounds warm up."""
    times: dict[tuple[str, bool], list[float]] = {(label, both): [] for label in runs for both in (False, True)}
    for turn in range(rounds + 3):
        for (label, both), values in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            runs[label](both)
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                values.append(start.elapsed_time(end) * 1000.0)
    return {label: (statistics.median(times[label, False]), statistics.median(times[label, True])) for label in runs}


if __name__ == "__main__":
    sys.exit(main())
