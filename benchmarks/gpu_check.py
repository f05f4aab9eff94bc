"""Checks the GPU kernels on this machine's GPU and times them; one command for everybody who has one.

    python -m benchmarks.gpu_check                 # correctness against float64, then a table of times
    python -m benchmarks.gpu_check --json gpu.json
    python -m benchmarks.gpu_check --dry-run       # the same program over the torch forms on the CPU, tiny shapes

Exit code: 0 when everything that can run agrees, 1 when something is wrong, 2 when nothing can run: no GPU, no Triton.
Times are medians of CUDA events over interleaved rounds, in microseconds. A dry run says nothing about any GPU: it
shows that the program itself works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlstm_rl.kernels import MLSTMState, SLSTMState, mlstm_sequence, slstm_sequence, why_not

# Largest allowed error relative to the largest expected value of a tensor.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
WARM_UP = 3

Row = dict[str, Any]
# Called with whether the backward pass is wanted too.
Contender = Callable[[bool], None]


@dataclass(frozen=True)
class Plan:
    """What is checked and timed, and where."""

    device: str = "cuda"
    backend: str = "triton"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    lengths: tuple[int, ...] = (1, 2, 37, 200)
    # B, T, H, D
    shapes: tuple[tuple[int, int, int, int], ...] = (
        *((16, 32, 4, 16), (64, 128, 4, 16), (64, 128, 4, 64)),
        *((1024, 128, 4, 64), (64, 128, 4, 128), (1024, 1, 4, 64)),
    )
    # The only public kernels of an mLSTM; their chunks are 64 long.
    public_kernel: str = "chunkwise--triton_xl_chunk"

    def random(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


DRY_RUN = Plan(
    device="cpu",
    backend="torch",
    widths=(16,),
    lengths=(1, 3),
    shapes=((2, 3, 1, 16), (1, 64, 1, 16)),
    public_kernel="chunkwise--native_autograd",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="how often each contender is timed")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--dry-run", action="store_true", help="go through everything on the CPU")
    args = parser.parse_args(arguments)
    plan = DRY_RUN if args.dry_run else Plan()
    obstacle = None if args.dry_run else _obstacle()
    if obstacle is not None:
        print(f"{obstacle} Nothing was checked and nothing was timed.")
        return 2
    machine = _machine(plan)
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    errors = check(plan)
    if all(row["skipped"] for row in errors):
        print(f"No kernel can run here: {errors[0]['skipped']}. Nothing was checked and nothing was timed.")
        return 2
    wrong = sum(row["wrong"] for row in errors)
    times = measure(plan, args.rounds) if wrong == 0 else []
    if args.json:
        args.json.write_text(json.dumps({**machine, "errors": errors, "times": times}, indent=2) + "\n")
    print(f"{wrong} cases are WRONG: please report this output." if wrong else "All cases agree with float64.")
    if args.dry_run:
        print("This was a dry run of the torch forms on the CPU: no GPU kernel ran.")
    return 1 if wrong else 0


def _obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "No GPU: torch.cuda.is_available() is false."
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)."
    return None


def _machine(plan: Plan) -> dict[str, str]:
    if plan.device == "cpu":
        return {"gpu": "none (dry run)", "torch": torch.__version__}
    triton = import_module("triton")
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def check(plan: Plan) -> list[Row]:
    """Compare values and gradients of every kernel with the recurrence in float64; a row per case."""
    rows: list[Row] = []
    print(f"\n{'operation':10s} {'width':>5s} {'dtype':9s} {'T':>4s} {'forget':8s} worst error")
    for operation in ("mlstm", "slstm"):
        for D in plan.widths:
            for dtype in ALLOWED:
                for T in plan.lengths:
                    for activation in ("sigmoid", "exp"):
                        row = check_case(plan, operation, D, dtype, T, activation)
                        rows.append(row)
                        verdict = row["skipped"] or f"{row['error']:.1e}{'  WRONG' if row['wrong'] else ''}"
                        print(f"{operation:10s} {D:5d} {str(dtype)[6:]:9s} {T:4d} {activation:8s} {verdict}")
    return rows


def check_case(plan: Plan, operation: str, D: int, dtype: torch.dtype, T: int, activation: Any) -> Row:
    """Compare one case."""
    tensors, state, reset = inputs(plan, operation, 5, T, 2, D, dtype)
    reason = why_not(plan.backend, tensors[0])
    case = {"operation": operation, "width": D, "dtype": str(dtype)[6:], "T": T, "forget": activation}
    if reason is not None:
        return {**case, "skipped": reason, "error": None, "wrong": False}
    actual = _differentiated(plan, operation, tensors, state, reset, activation, plan.backend)
    exact = [x.double() for x in tensors], [x.double() for x in state], reset
    expected = _differentiated(plan, operation, *exact, activation, "reference")
    error = max(_relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    return {**case, "skipped": "", "error": error, "wrong": not error <= ALLOWED[dtype]}


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1)
    return float(error) if bool(actual.isfinite().all()) else float("inf")


def inputs(
    plan: Plan, operation: str, B: int, T: int, H: int, D: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Random inputs, state and resets of a call."""
    g = plan.random(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=plan.device)

    if operation == "mlstm":
        # Positive queries and keys keep `n . q` away from zero, where rounding errors are divided by nothing.
        tensors = [normal(B, T, H, D).abs() + 0.5, normal(B, T, H, D).abs() + 0.5, normal(B, T, H, D)]
        tensors += [normal(B, T, H), normal(B, T, H) + 3.0]
        state = [normal(B, H, D, D), normal(B, H, D).abs() + 0.5, normal(B, H).abs()]
    else:
        tensors = [normal(B, T, 4, H, D), normal(4, H, D, D) * D**-0.5]
        state = [normal(B, H, D), normal(B, H, D).abs() + 1.0, normal(B, H, D).tanh(), normal(B, H, D)]
    reset = torch.rand(B, T, generator=g, device=plan.device) < 0.05
    return [x.to(dtype) for x in tensors], state, reset


def _call(
    operation: str, tensors: list[Tensor], state: list[Tensor], reset: Tensor, activation: Any, backend: str
) -> tuple[Tensor, MLSTMState | SLSTMState]:
    """One call through the door."""
    options: dict[str, Any] = {"forget_activation": activation, "backend": backend}
    if operation == "mlstm":
        q, k, v, i, f = tensors
        return mlstm_sequence(q, k, v, i, f, MLSTMState(*state), reset, **options)
    return slstm_sequence(tensors[0], tensors[1], SLSTMState(*state), reset, **options)


def _differentiated(
    plan: Plan,
    operation: str,
    tensors: list[Tensor],
    state: list[Tensor],
    reset: Tensor,
    activation: Any,
    backend: str,
) -> list[Tensor]:
    """Outputs, final state, and the gradients of a fixed random linear function of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    state = [*(x.detach().requires_grad_() for x in state[:-1]), state[-1]]
    hidden, last = _call(operation, tensors, state, reset, activation, backend)
    outputs = [hidden, *last[:-1]]
    g = plan.random(1)
    slopes = [torch.randn(x.shape, generator=g, device=plan.device).to(x.dtype) for x in outputs]
    # The same numbers for every precision: bfloat16 holds them all.
    slopes = [s.bfloat16().to(s.dtype) for s in slopes]
    gradients = torch.autograd.grad(outputs, [*tensors, *state[:-1]], slopes, materialize_grads=True)
    return [x.detach() for x in (*outputs, *gradients)]


def measure(plan: Plan, rounds: int) -> list[Row]:
    """Time forward and backward of all contenders on all shapes; a row per shape and contender."""
    rows: list[Row] = []
    print(f"\n{'B':>5s} {'T':>4s} {'H':>3s} {'D':>4s} {'dtype':9s} {'contender':28s} {'forward':>9s} {'both':>9s}  us")
    for B, T, H, D in plan.shapes:
        for dtype in ALLOWED:
            runs = contenders(plan, B, T, H, D, dtype)
            for label, (forward, both) in _interleaved(plan, runs, rounds).items():
                shape = {"B": B, "T": T, "H": H, "D": D, "dtype": str(dtype)[6:], "contender": label}
                rows.append({**shape, "forward_us": forward, "both_us": both})
                print(f"{B:5d} {T:4d} {H:3d} {D:4d} {str(dtype)[6:]:9s} {label:28s} {forward:9.1f} {both:9.1f}")
    return rows


def contenders(plan: Plan, B: int, T: int, H: int, D: int, dtype: torch.dtype) -> dict[str, Contender]:
    """What can be timed here: label and a function that runs it, forward only or with its backward pass."""
    found: dict[str, Contender] = {}
    for operation in ("mlstm", "slstm"):
        for backend in ("triton", "torch"):
            tensors, state, reset = inputs(plan, operation, B, T, H, D, dtype)
            if why_not(backend, tensors[0]) is None:
                found[f"{operation}, {backend}"] = _sequence(operation, tensors, state, reset, backend)
    found["torch.nn.LSTM"] = _lstm(plan, B, T, H * D, dtype)
    if find_spec("mlstm_kernels") is not None and T % 64 == 0:
        public = _mlstm_kernels(plan, B, T, H, D, dtype)
        if public is not None:
            found["mlstm_kernels"] = public
    return found


def _sequence(operation: str, tensors: list[Tensor], state: list[Tensor], reset: Tensor, backend: str) -> Contender:
    return _timed(lambda *leaves: _call(operation, list(leaves), state, reset, "sigmoid", backend)[0], tensors, tensors)


def _lstm(plan: Plan, B: int, T: int, width: int, dtype: torch.dtype) -> Contender:
    """What PyTorch offers on the device: on a GPU it is cuDNN's."""
    layer = torch.nn.LSTM(width, width, batch_first=True, device=plan.device, dtype=dtype)
    x = torch.randn(B, T, width, device=plan.device, dtype=dtype)
    return _timed(lambda x: layer(x)[0], [x], [x, *layer.parameters()])


def _mlstm_kernels(plan: Plan, B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Contender | None:
    tensors, _, _ = inputs(plan, "mlstm", B, T, H, D, dtype)
    leaves = [x.transpose(1, 2).contiguous() for x in tensors]
    # They do not run with every version of Triton, and fail in many ways; that must not cost our own figures.
    try:
        kernel = import_module("mlstm_kernels.torch").get_mlstm_kernel(plan.public_kernel)
        run = _timed(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f), leaves, leaves)
        run(True)
    except Exception as error:
        print(f"mlstm_kernels is left out, it fails: {type(error).__name__}: {error}")
        return None
    return run


def _timed(forward: Callable[..., Tensor], arguments: list[Tensor], leaves: list[Tensor]) -> Contender:
    for leaf in leaves:
        leaf.requires_grad_()

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            hidden = forward(*arguments)
        if backward:
            torch.autograd.grad(hidden, leaves, torch.ones_like(hidden))

    return run


def _interleaved(plan: Plan, runs: dict[str, Contender], rounds: int) -> dict[str, tuple[float, float]]:
    """Median microseconds of forward, and of forward and backward; the first rounds warm up."""
    microseconds = _cuda_microseconds if plan.device == "cuda" else _cpu_microseconds
    times: dict[tuple[str, bool], list[float]] = {(label, both): [] for label in runs for both in (False, True)}
    for turn in range(rounds + WARM_UP):
        for (label, both), values in times.items():
            spent = microseconds(runs[label], both)
            if turn >= WARM_UP:
                values.append(spent)
    return {label: (statistics.median(times[label, False]), statistics.median(times[label, True])) for label in runs}


def _cuda_microseconds(run: Contender, both: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run(both)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1000.0


def _cpu_microseconds(run: Contender, both: bool) -> float:
    start = time.perf_counter()
    run(both)
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    sys.exit(main())
