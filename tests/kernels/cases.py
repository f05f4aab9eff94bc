"""Random arguments for the sequence kernels, one shape of case for both, so that their laws are written once."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from xlstm_rl.kernels import (
    ForgetActivation,
    MLSTMState,
    SLSTMState,
    backends,
    mlstm_sequence,
    slstm_sequence,
    why_not,
)

OPERATIONS = ("mlstm", "slstm")
# Those that can run on this machine's CPU; the GPU kernels have their own tests in tests/gpu.
BACKENDS = tuple(name for name in backends() if why_not(name, torch.zeros(1, 1, 1, 16)) is None)
FAST_BACKENDS = tuple(name for name in BACKENDS if name != "reference")
State = MLSTMState | SLSTMState


class Case(NamedTuple):
    """Arguments of one call."""

    sequence: tuple[Tensor, ...]  # with time in dimension 1
    weights: tuple[Tensor, ...]
    state: State
    reset: Tensor
    forget_activation: ForgetActivation


class Result(NamedTuple):
    """What a call gives, with the gradients of a random linear function of it."""

    hidden: Tensor
    state: State
    sequence_gradient: tuple[Tensor, ...]
    weights_gradient: tuple[Tensor, ...]
    state_gradient: tuple[Tensor, ...]  # but for the stabilizer


def run(case: Case, backend: str) -> tuple[Tensor, State]:
    """Call the kernel that the case is for."""
    return _call(case, case.state, case.reset, backend)


def run_without_state(case: Case, backend: str) -> tuple[Tensor, State]:
    """Call the kernel with neither state nor resets."""
    return _call(case, None, None, backend)


def _call(case: Case, state: Any, reset: Tensor | None, backend: str) -> tuple[Tensor, State]:
    if isinstance(case.state, MLSTMState):
        q, k, v, i, f = case.sequence
        return mlstm_sequence(q, k, v, i, f, state, reset, forget_activation=case.forget_activation, backend=backend)
    (gates,), (recurrent,) = case.sequence, case.weights
    return slstm_sequence(gates, recurrent, state, reset, forget_activation=case.forget_activation, backend=backend)


def evaluate(case: Case, backend: str) -> Result:
    """Call the kernel and differentiate through all its outputs and inputs."""
    case = leaves(case)
    hidden, state = run(case, backend)
    gradients = differentiate(case, hidden, state)
    return Result(hidden.detach(), like(state, (leaf.detach() for leaf in state)), *gradients)


def differentiate(
    case: Case, hidden: Tensor, state: State
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of a fixed random linear function of the outputs: by sequence, weights and initial state."""
    generator = torch.Generator().manual_seed(1)
    loss = hidden.new_zeros(())
    for output in (hidden, *carrying_gradient(state)):
        loss = loss + (output * normal(generator, *output.shape, dtype=hidden.dtype)).sum()
    inputs = (*case.sequence, *case.weights, *carrying_gradient(case.state))
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    S, W = len(case.sequence), len(case.weights)
    return tuple(gradients[:S]), tuple(gradients[S : S + W]), tuple(gradients[S + W :])


def rms_errors(case: Case, backend: str) -> tuple[float, float]:
    """Error of float32 against float64 relative to the root mean square: of the hidden states, and the largest of those
    of the gradients by the sequence and the weights."""
    exact, rough = evaluate(case, backend), evaluate(cast(case, torch.float32), backend)

    def error(a: Tensor, e: Tensor) -> float:
        return float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt())

    gradients = zip(
        rough.sequence_gradient + rough.weights_gradient, exact.sequence_gradient + exact.weights_gradient, strict=True
    )
    return error(rough.hidden, exact.hidden), max(error(a, e) for a, e in gradients)


def carrying_gradient(state: State) -> tuple[Tensor, ...]:
    """The leaves of a state without its stabilizer, which is a choice of scale."""
    return tuple(state[:-1])


def leaves(case: Case) -> Case:
    """The same case with every input asking for its gradient."""
    state = case.state
    return case._replace(
        sequence=tuple(x.detach().clone().requires_grad_() for x in case.sequence),
        weights=tuple(x.detach().clone().requires_grad_() for x in case.weights),
        state=like(state, (*(x.detach().clone().requires_grad_() for x in state[:-1]), state.stabilizer)),
    )


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The same case in another precision."""
    return case._replace(
        sequence=tuple(x.to(dtype) for x in case.sequence),
        weights=tuple(x.to(dtype) for x in case.weights),
        state=like(case.state, (x.to(dtype) for x in case.state)),
    )


def steps(case: Case, time: slice) -> Case:
    """The part of the case that lies in a span of time."""
    return case._replace(sequence=tuple(x[:, time] for x in case.sequence), reset=case.reset[:, time])


def rows(case: Case, chosen: slice) -> Case:
    """The part of the case that belongs to some rows."""
    return case._replace(
        sequence=tuple(x[chosen] for x in case.sequence),
        state=like(case.state, (x[chosen] for x in case.state)),
        reset=case.reset[chosen],
    )


def like(state: State, leaves: Iterable[Tensor]) -> State:
    """A state of the same kind with other leaves."""
    return MLSTMState(*leaves) if isinstance(state, MLSTMState) else SLSTMState(*leaves)


def emptied(state: State) -> State:
    return like(state, (torch.zeros_like(x) for x in state))


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def make_case(
    operation: str,
    *,
    B: int = 2,
    T: int = 12,
    H: int = 2,
    K: int = 5,
    V: int = 3,
    gate: float = 15.0,
    reset: float = 0.1,
    forget_activation: ForgetActivation = "sigmoid",
    seed: int = 0,
    empty_state: bool = False,
) -> Case:
    """A float64 case with gates up to +-`gate` and episodes that start with probability `reset` (V: mLSTM only).

    Queries and keys are positive, so that `n . q` stays away from zero, where rounding errors are divided by nothing.
    """
    g = torch.Generator().manual_seed(seed)
    starts = torch.rand(B, T, generator=g) < reset
    state: State
    sequence: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()
    if operation == "mlstm":
        q, k, v = normal(g, B, T, H, K).abs() + 0.5, normal(g, B, T, H, K).abs() + 0.5, normal(g, B, T, H, V)
        gates = uniform(g, -gate, gate, 2, B, T, H)
        state = MLSTMState(normal(g, B, H, K, V), normal(g, B, H, K).abs() + 0.5, uniform(g, 0.0, 3.0, B, H))
        sequence = (q, k, v, gates[0], gates[1])
    else:
        sequence = (uniform(g, -gate, gate, B, T, 4, H, K),)
        weights = (normal(g, 4, H, K, K) * K**-0.5,)
        unit = uniform(g, -1.0, 1.0, 3, B, H, K)
        state = SLSTMState(unit[0], uniform(g, 1.0, 3.0, B, H, K), unit[1], 3.0 * unit[2])
    if empty_state:
        state = emptied(state)
    return Case(sequence, weights, state, starts, forget_activation)


@st.composite
def cases(
    draw: st.DrawFn, operation: str, *, shortest: int = 1, longest: int = 70, gate: float = 15.0, exp: bool = True
) -> Case:
    """Cases of any shape, from empty or full states, with sparse, dense and awkwardly placed resets."""
    activations: tuple[ForgetActivation, ...] = ("sigmoid", "exp") if exp else ("sigmoid",)
    T = draw(st.integers(shortest, longest), label="T")
    case = make_case(
        operation,
        B=draw(st.integers(1, 4), label="B"),
        T=T,
        H=draw(st.integers(1, 3), label="H"),
        K=draw(st.integers(1, 7), label="K"),
        V=draw(st.integers(1, 7), label="V"),
        gate=draw(st.sampled_from((1.0, gate)), label="gate"),
        reset=draw(st.sampled_from((0.0, 0.03, 0.5)), label="reset"),
        forget_activation=draw(st.sampled_from(activations), label="forget_activation"),
        seed=draw(st.integers(0, 2**32), label="seed"),
        empty_state=draw(st.booleans(), label="empty_state"),
    )
    edges = st.sampled_from((0, 1, T - 1, T // 2, T // 2 + 1, -(-T // 3), 31, 32, 33))
    for t in draw(st.lists(edges, max_size=4), label="starts"):
        if 0 <= t < T:
            case.reset[draw(st.integers(0, case.reset.shape[0] - 1)), t] = True
    return case
