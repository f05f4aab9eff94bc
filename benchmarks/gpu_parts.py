"""The parts of `benchmarks.gpu_check`: what is checked and timed, and the process that does it when asked.

A part is named by a line such as "check mlstm_forward 64 bfloat16" and gives rows; what fails in it is a row that says
so.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from xlstm_rl.kernels import MLSTMState, SLSTMState, mlstm_sequence, slstm_sequence, why_not

# Largest allowed error relative to the largest expected value of a tensor.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = {str(dtype)[6:]: dtype for dtype in ALLOWED}
KERNELS = ("mlstm_forward", "mlstm_step", "mlstm_backward", "slstm_forward", "slstm_backward")
WARM_UP = 3
# Of a row.
RIGHT, WRONG, FAILED, SKIPPED = "right", "WRONG", "FAILED", "skipped"

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
        *((1024, 128, 4, 64), (64, 128, 4, 64), (1024, 1, 4, 64)),
        *((16, 32, 4, 16), (64, 128, 4, 16), (64, 128, 4, 128)),
    )
    rounds: int = 20
    environments: tuple[int, ...] = (256, 1024)
    n_steps: int = 32
    # The only public kernels of an mLSTM; their chunks are 64 long.
    public_kernel: str = "chunkwise--triton_xl_chunk"

    def random(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def parts(self) -> Iterator[str]:
        """All of them, what matters most first."""
        for width in sorted(self.widths, key=lambda width: (width != 64, width)):
            yield from (f"check {kernel} {width} {dtype}" for kernel in KERNELS for dtype in DTYPES)
        yield from (f"agent {n_envs}" for n_envs in self.environments)
        yield from (f"act {n_envs}" for n_envs in self.environments)
        yield "ceilings"
        for shape in self.shapes:
            yield from (f"time {','.join(map(str, shape))} {dtype}" for dtype in DTYPES)


PLANS = {
    "gpu": Plan(),
    "dry-run": Plan(
        device="cpu",
        backend="torch",
        widths=(16,),
        lengths=(1, 3),
        shapes=((2, 3, 1, 16), (1, 64, 1, 16)),
        rounds=1,
        environments=(4,),
        n_steps=8,
        public_kernel="chunkwise--native_autograd",
    ),
}


def serve(plan: Plan) -> None:
    """Read names of parts from standard input and answer each with a line of JSON, its rows."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # whatever else is printed goes beside the answers
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        rows = run_part(plan, line.strip())
        print(json.dumps(rows), file=answers, flush=True)
        if any(row["status"] == FAILED for row in rows) and plan.device == "cuda":
            # after an illegal access nothing works in a process any more; this one then ends with that error
            torch.cuda.synchronize()


def run_part(plan: Plan, name: str) -> list[Row]:
    """What a part finds; see `Plan.parts`."""
    kind, *rest = name.split()
    found: list[Row]
    if kind == "check":
        kernel, width, dtype = rest
        found = list(check(plan, kernel, int(width), DTYPES[dtype]))
    elif kind == "time":
        B, T, H, D = map(int, rest[0].split(","))
        found = list(measure(plan, B, T, H, D, DTYPES[rest[1]]))
    elif kind == "agent":
        found = [attempt({"n_envs": int(rest[0]), "device": d}, agent, plan, int(rest[0]), d) for d in _devices(plan)]
    elif kind == "act":
        ways = ("eager", "CUDA graph")
        found = [attempt({"n_envs": int(rest[0]), "way": w}, act, plan, int(rest[0]), w) for w in ways]
    else:
        found = [attempt({"what": what}, ceiling, plan, what) for what in ("copy", "bfloat16 product")]
    return [{"part": name, **row} for row in found]


def attempt(case: Row, function: Callable[..., Row], *arguments: Any) -> Row:
    """A case with what a function finds; where that fails, with the reason."""
    # compilers, drivers and kernels fail in every way there is, and nothing of that may hide the rest
    try:
        return {**case, "status": RIGHT, "problem": "", **function(*arguments)}
    except ModuleNotFoundError as error:
        return {**case, "status": SKIPPED, "problem": f"{error.name} is not installed"}
    except Exception as error:
        text = " ".join(str(error).split())
        return {**case, "status": FAILED, "problem": f"{type(error).__name__}: {text:.300}"}


def _devices(plan: Plan) -> list[str]:
    return list(dict.fromkeys((plan.device, "cpu")))


# Correctness.


def check(plan: Plan, kernel: str, D: int, dtype: torch.dtype) -> Iterator[Row]:
    """Compare values, or values and gradients, of a kernel with the recurrence in float64; a row per case."""
    for activation in ("sigmoid", "exp"):
        for T in plan.lengths:
            # the mLSTM's single step is a kernel of its own
            if kernel == "slstm_forward" or kernel.endswith("backward") or (T == 1) == (kernel == "mlstm_step"):
                case = {"kernel": kernel, "width": D, "dtype": str(dtype)[6:], "T": T, "forget": activation}
                yield attempt(case, check_case, plan, kernel, D, dtype, T, activation)


def check_case(plan: Plan, kernel: str, D: int, dtype: torch.dtype, T: int, activation: Any) -> Row:
    """Compare one case."""
    operation, _, direction = kernel.partition("_")
    tensors, state, reset = inputs(plan, operation, 5, T, 2, D, dtype)
    reason = why_not(plan.backend, tensors[0])
    if reason is not None:
        return {"status": SKIPPED, "problem": reason}
    exact = [x.double() for x in tensors], [x.double() for x in state], reset
    results = _differentiated if direction == "backward" else _computed
    actual = results(plan, operation, tensors, state, reset, activation, plan.backend)
    expected = results(plan, operation, *exact, activation, "reference")
    error = max(_relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    right = error <= ALLOWED[dtype]
    problem = "" if right else f"error {error:.1e}, allowed {ALLOWED[dtype]:.0e}"
    return {"error": error, "status": RIGHT if right else WRONG, "problem": problem}


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


def _computed(
    plan: Plan,
    operation: str,
    tensors: list[Tensor],
    state: list[Tensor],
    reset: Tensor,
    activation: Any,
    backend: str,
) -> list[Tensor]:
    """Outputs and final state, as in acting."""
    with torch.no_grad():
        hidden, last = _call(operation, tensors, state, reset, activation, backend)
    return [hidden, *last]


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


# Speed.


def measure(plan: Plan, B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Iterator[Row]:
    """Time forward and backward of all contenders on a shape; a row for each."""
    shape = {"B": B, "T": T, "H": H, "D": D, "dtype": str(dtype)[6:]}
    runs: dict[str, Contender] = {}
    for label, make in contenders(plan, B, T, H, D, dtype).items():
        row = attempt({**shape, "contender": label}, _first_run, label, make, runs)
        if row["status"] != RIGHT:
            yield row
    for label, times in interleaved(plan, runs).items():
        yield attempt({**shape, "contender": label}, lambda times=times: times)


def _first_run(label: str, make: Callable[[], Contender], runs: dict[str, Contender]) -> Row:
    run = make()
    run(True)
    runs[label] = run
    return {}


def contenders(plan: Plan, B: int, T: int, H: int, D: int, dtype: torch.dtype) -> dict[str, Callable[[], Contender]]:
    """What can be timed here: label and a function that makes it; it runs forward only or with its backward pass."""
    found: dict[str, Callable[[], Contender]] = {}
    for operation in ("mlstm", "slstm"):
        for backend in ("triton", "torch"):
            tensors, state, reset = inputs(plan, operation, B, T, H, D, dtype)
            if why_not(backend, tensors[0]) is None:
                found[f"{operation}, {backend}"] = partial(_sequence, operation, tensors, state, reset, backend)
    found["torch.nn.LSTM"] = partial(_lstm, plan, B, T, H * D, dtype)
    if find_spec("mlstm_kernels") is not None and T % 64 == 0:
        found["mlstm_kernels"] = partial(_mlstm_kernels, plan, B, T, H, D, dtype)
    return found


def _sequence(operation: str, tensors: list[Tensor], state: list[Tensor], reset: Tensor, backend: str) -> Contender:
    return _timed(lambda *leaves: _call(operation, list(leaves), state, reset, "sigmoid", backend)[0], tensors, tensors)


def _lstm(plan: Plan, B: int, T: int, width: int, dtype: torch.dtype) -> Contender:
    """What PyTorch offers on the device: on a GPU it is cuDNN's."""
    layer = torch.nn.LSTM(width, width, batch_first=True, device=plan.device, dtype=dtype)
    x = torch.randn(B, T, width, device=plan.device, dtype=dtype)
    return _timed(lambda x: layer(x)[0], [x], [x, *layer.parameters()])


def _mlstm_kernels(plan: Plan, B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Contender:
    tensors, _, _ = inputs(plan, "mlstm", B, T, H, D, dtype)
    leaves = [x.transpose(1, 2).contiguous() for x in tensors]
    kernel = import_module("mlstm_kernels.torch").get_mlstm_kernel(plan.public_kernel)
    return _timed(lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f), leaves, leaves)


def _timed(forward: Callable[..., Tensor], arguments: list[Tensor], leaves: list[Tensor]) -> Contender:
    for leaf in leaves:
        leaf.requires_grad_()

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            hidden = forward(*arguments)
        if backward:
            torch.autograd.grad(hidden, leaves, torch.ones_like(hidden))

    return run


def interleaved(plan: Plan, runs: dict[str, Contender]) -> dict[str, Row]:
    """Median microseconds of forward, and of forward and backward; the first rounds warm up."""
    microseconds = _cuda_microseconds if plan.device == "cuda" else _cpu_microseconds
    times: dict[tuple[str, bool], list[float]] = {(label, both): [] for label in runs for both in (False, True)}
    for turn in range(plan.rounds + WARM_UP):
        for (label, both), values in times.items():
            spent = microseconds(runs[label], both)
            if turn >= WARM_UP:
                values.append(spent)
    return {
        label: {
            "forward_us": statistics.median(times[label, False]),
            "both_us": statistics.median(times[label, True]),
        }
        for label in runs
    }


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


def ceiling(plan: Plan, what: str) -> Row:
    """What the device can do at best: bytes copied, read and written, or operations of a product, per second."""
    size = 8192 if plan.device == "cuda" else 256
    if what == "copy":
        one = torch.zeros(size, size, device=plan.device)
        other = torch.empty_like(one)
        times = interleaved(plan, {what: lambda both: None if both else (other.copy_(one), None)[1]})
        return {"tera_per_s": 2 * one.nbytes / times[what]["forward_us"] / 1e6, "unit": "TB/s"}
    one = torch.randn(size, size, device=plan.device, dtype=torch.bfloat16)
    times = interleaved(plan, {what: lambda both: None if both else (one @ one, None)[1]})
    return {"tera_per_s": 2 * size**3 / times[what]["forward_us"] / 1e6, "unit": "TFLOP/s"}


# Agents.


def agent(plan: Plan, n_envs: int, device: str) -> Row:
    """Train a whole agent for a few rollouts: environment steps per second of all, of collecting and of updating."""
    # these need more packages than the kernels
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmarks.tensor_recall import TensorRecall
    from xlstm_rl.agents import RecurrentPPO

    class Clock(BaseCallback):
        """Notes when rollouts begin and end."""

        times: list[float] = []  # noqa: RUF012

        def _on_rollout_start(self) -> None:
            self.times = [*self.times, _now(device)]

        def _on_rollout_end(self) -> None:
            self.times = [*self.times, _now(device)]

        def _on_step(self) -> bool:
            return True

    steps = n_envs * plan.n_steps
    settings: dict[str, Any] = {"n_steps": plan.n_steps, "batch_size": max(steps // 4, 1), "n_epochs": 2}
    policy_kwargs = {"memory_kwargs": {"hidden_size": 64, "blocks": "ms", "num_heads": 1}}
    env = TensorRecall(n_envs, device=device)
    model = RecurrentPPO("MlpXLSTMPolicy", env, seed=0, device=device, policy_kwargs=policy_kwargs, **settings)
    # kernels are compiled, memory is got
    model.learn(steps)
    clock = Clock()
    model.learn(2 * steps, callback=clock, reset_num_timesteps=False)
    times = [*clock.times, _now(device)]
    collecting = sum(end - start for start, end in zip(times[0:-1:2], times[1::2], strict=True))
    seconds = times[-1] - times[0]
    return {
        "steps_per_s": 2 * steps / seconds,
        "collecting_per_s": 2 * steps / collecting,
        "updating_per_s": 2 * steps / (seconds - collecting),
    }


def act(plan: Plan, n_envs: int, way: str) -> Row:
    """Time one step of a policy in every environment, launched kernel by kernel or as a CUDA graph."""
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.utils import ConstantSchedule

    from xlstm_rl.agents import XLSTMPolicy
    from xlstm_rl.memory import leaves, map_leaves

    if way == "CUDA graph" and plan.device != "cuda":
        return {"status": SKIPPED, "problem": "there is no GPU"}
    space = spaces.Box(-np.inf, np.inf, (32,), np.float32)
    kwargs = {"hidden_size": 64, "blocks": "ms", "num_heads": 1}
    policy = XLSTMPolicy(space, spaces.Discrete(4), ConstantSchedule(0.0), memory_kwargs=kwargs).to(plan.device)
    policy.set_training_mode(False)
    obs = torch.zeros(n_envs, 32, device=plan.device)
    reset = torch.zeros(n_envs, dtype=torch.bool, device=plan.device)
    state = map_leaves(torch.clone, policy.initial_state(n_envs))

    def step() -> None:
        result = policy.act(obs, state, reset)
        for kept, new in zip(leaves(state), leaves(result.state), strict=True):
            kept.copy_(new)

    with torch.no_grad():
        for _ in range(WARM_UP):
            step()
        run = step
        if way == "CUDA graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        times = interleaved(plan, {way: lambda both: None if both else run()})
    return {"step_us": times[way]["forward_us"], "steps_per_s": n_envs * 1e6 / times[way]["forward_us"]}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    # the one that asks ends this with Ctrl-C too, and says so itself
    with suppress(KeyboardInterrupt):
        serve(PLANS[sys.argv[1]])
