"""Every memory core obeys the laws, and a core that breaks one is caught."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlstm_rl.memory import MemoryCore, laws, leaves, make_memory, zeros_where
from xlstm_rl.memory.laws import check_memory_laws

SMALL: dict[str, Any] = {"defaults": "paper", "hidden_size": 16, "num_heads": 2, "recurrent_std": 1.0}
CORES: dict[str, tuple[str, dict[str, Any]]] = {
    "m": ("xlstm", SMALL | {"blocks": "m"}),
    "s": ("xlstm", SMALL | {"blocks": "s"}),
    "ms": ("xlstm", SMALL | {"blocks": "ms"}),
    "mms without conv": ("xlstm", SMALL | {"blocks": "mms", "conv_kernel": 0}),
    "sm with long conv and biases": ("xlstm", SMALL | {"blocks": "sm", "conv_kernel": 6, "bias": True}),
    "ms with dropout": ("xlstm", SMALL | {"blocks": "ms", "dropout": 0.5}),
    "m with sigmoid input gate and soft cap": (
        "xlstm",
        SMALL | {"blocks": "m", "input_activation": "sigmoid", "gate_soft_cap": 15.0},
    ),
    "s without FFN": ("xlstm", SMALL | {"blocks": "s", "ffn_factor": 0.0, "post_norm": False}),
    "sm with one sLSTM head and conv of its own": (
        "xlstm",
        SMALL | {"blocks": "sm", "slstm_num_heads": 1, "slstm_conv_kernel": 0},
    ),
    "lstm": ("lstm", {"hidden_size": 8}),
    "two-layer lstm": ("lstm", {"hidden_size": 8, "num_layers": 2}),
    "gru": ("gru", {"hidden_size": 8}),
    "none": ("none", {"hidden_size": 8}),
    "transformer": ("transformer", {"hidden_size": 8, "num_heads": 2, "window": 5}),
    "two-layer transformer": ("transformer", {"hidden_size": 8, "num_layers": 2, "window": 3}),
    "ssm": ("ssm", {"hidden_size": 8, "num_states": 2}),
    "as recommended": ("xlstm", {"hidden_size": 8}),
    "mas": ("xlstm", SMALL | {"blocks": "mas", "attention_window": 5}),
    "gru of two layers": ("gru", {"hidden_size": 6, "num_layers": 2, "bias": False}),
    "two-layer ssm without conv": ("ssm", {"hidden_size": 6, "num_layers": 2, "conv_kernel": 1}),
    "rwkv": ("rwkv", {"hidden_size": 8}),
    "two-layer rwkv": ("rwkv", {"hidden_size": 5, "num_layers": 2, "ffn_factor": 1.5}),
    "mrs": ("xlstm", SMALL | {"blocks": "mrs"}),
    "frames": ("frames", {"hidden_size": 8}),
    "one frame": ("frames", {"hidden_size": 8, "num_frames": 1}),
}
EXPONENTIAL = ("xlstm", SMALL | {"blocks": "ms", "forget_activation": "exp"})


def perturbed(name: str, config: dict[str, Any], dtype: torch.dtype, scale: float = 0.1, seed: int = 0) -> MemoryCore:
    """A core with every parameter moved, so that no zero init hides a mistake."""
    # else the initial weights, and with them how near a tolerance is, would depend on the tests before
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    core = make_memory(name, 5, **config).to(dtype)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return core


@pytest.mark.parametrize("label", CORES)
@settings(max_examples=6)
@given(batch_size=st.integers(2, 4), steps=st.integers(2, 20), seed=st.integers(0, 2**16))
def test_core_obeys_the_laws(label: str, batch_size: int, steps: int, seed: int) -> None:
    core = perturbed(*CORES[label], torch.float64, seed=seed)
    check_memory_laws(core, batch_size=batch_size, steps=steps, seed=seed)


@pytest.mark.parametrize("label", CORES)
@pytest.mark.parametrize("seed", [0, 1])
def test_core_obeys_the_laws_in_single_precision(label: str, seed: int) -> None:
    check_memory_laws(perturbed(*CORES[label], torch.float32, seed=seed), batch_size=2, steps=6, seed=seed)


def test_exponential_forget_gates_obey_the_laws_in_double_precision() -> None:
    check_memory_laws(perturbed(*EXPONENTIAL, torch.float64), steps=12)


@pytest.mark.parametrize("label", CORES)
@pytest.mark.parametrize(
    "starts",
    [[], [0], [69], [31, 32, 33], [0, 1, 2], [32], [64], [10, 11, 50]],
    ids=lambda starts: "-".join(map(str, starts)) or "none",
)
def test_core_obeys_the_laws_with_episode_starts_at_chunk_edges(label: str, starts: list[int]) -> None:
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[0, starts] = True
    reset[1, [t // 2 for t in starts]] = True
    check_memory_laws(perturbed(*CORES[label], torch.float64), batch_size=2, steps=70, reset=reset)


@pytest.mark.parametrize("blocks", ["m", "s", "ms"])
def test_strongly_driven_gates_obey_the_laws(blocks: str) -> None:
    core = perturbed("xlstm", SMALL | {"blocks": blocks}, torch.float64)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if name.endswith(("gates.bias", "gate_bias")):
                parameter.copy_(torch.linspace(-15, 15, parameter.numel(), dtype=torch.float64).view_as(parameter))
    check_memory_laws(core, steps=40)


@pytest.mark.parametrize("blocks", ["m", "s", "ms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_at_one_hundred_give_finite_values_and_gradients(blocks: str, dtype: torch.dtype) -> None:
    core = perturbed("xlstm", SMALL | {"blocks": blocks}, dtype)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if name.endswith(("gates.bias", "gate_bias")):
                parameter.copy_(torch.linspace(-100, 100, parameter.numel()).view_as(parameter))
    x = torch.randn(2, 40, 5, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=False)
    y, _ = core(x, core.initial_state(2))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in core.parameters())


@pytest.mark.parametrize("label", CORES)
@pytest.mark.parametrize(("batch_size", "steps"), [(0, 4), (0, 1), (3, 0), (0, 0)])
def test_nothing_at_all_is_a_sequence_too(label: str, batch_size: int, steps: int) -> None:
    core = perturbed(*CORES[label], torch.float32)
    state = core.initial_state(batch_size)
    y, after = core(torch.randn(batch_size, steps, 5), state, torch.zeros(batch_size, steps, dtype=torch.bool))
    if y.requires_grad:  # torch's own RNNs without rows give a constant
        y.sum().backward()
    assert y.shape == (batch_size, steps, core.output_size)
    assert [leaf.shape for leaf in leaves(after)] == [leaf.shape for leaf in leaves(state)]
    assert all(p.grad is None or not p.grad.any() for p in core.parameters())


@pytest.mark.parametrize("label", CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast_changes_little(label: str, dtype: torch.dtype) -> None:
    core = perturbed(*CORES[label], torch.float32).eval()
    x, reset = torch.randn(3, 9, 5), torch.rand(3, 9) < 0.2
    expected, _ = core(x, core.initial_state(3), reset)
    with torch.autocast("cpu", dtype):
        y, _ = core(x, core.initial_state(3), reset)
        y.float().square().sum().backward()
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


def test_memory_keeps_its_dtype_under_autocast() -> None:
    core = perturbed("xlstm", SMALL | {"blocks": "ms"}, torch.float32)
    x = torch.randn(3, 9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = core(x, core.initial_state(3))
    torch.testing.assert_close(y, core(x, core.initial_state(3))[0])


class Accumulator(MemoryCore):
    """Sums its inputs: a correct core that the mutations below break one law at a time."""

    def __init__(self, input_size: int = 3) -> None:
        super().__init__()
        self.input_size = self.output_size = input_size
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def initial_state(self, batch_size: int) -> Any:
        return (self._zeros(batch_size, self.input_size),)

    def empty(self, reset: Tensor, state: Any) -> Any:
        return zeros_where(reset, state)

    def update(self, total: Tensor, x: Tensor) -> Tensor:
        return total + x

    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        outputs = []
        for t in range(x.shape[1]):
            if reset is not None:
                state = self.empty(reset[:, t], state)
            state = (self.update(state[0], x[:, t]),)
            outputs.append(state[0] * self.scale)
        return torch.stack(outputs, 1), state


class IgnoresResets(Accumulator):
    def empty(self, reset: Tensor, state: Any) -> Any:
        return state


class ScalesInsteadOfEmptying(Accumulator):
    def empty(self, reset: Tensor, state: Any) -> Any:
        return (state[0] * torch.where(reset, 1e-6, 1.0).double()[:, None],)


class MixesRows(Accumulator):
    def update(self, total: Tensor, x: Tensor) -> Tensor:
        return total + x + 1e-3 * x.mean(0)


class DetachesState(Accumulator):
    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().forward(x, (state[0].detach(),), reset)


class ForgetsBetweenCalls(Accumulator):
    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().forward(x, self.initial_state(len(x)), reset)


class StartsAtOne(Accumulator):
    def initial_state(self, batch_size: int) -> Any:
        return (self._zeros(batch_size, self.input_size) + 1,)


class WritesIntoTheState(Accumulator):
    def update(self, total: Tensor, x: Tensor) -> Tensor:
        return total.data.add_(x)


def test_correct_third_party_core_passes() -> None:
    check_memory_laws(Accumulator())


class OnItsDevice(Accumulator):
    """Refuses what is not on the device of its parameters, and not in their dtype."""

    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        given = [x, *state] + ([] if reset is None else [reset])
        assert {tensor.device for tensor in given} == {self.scale.device}
        assert {tensor.dtype for tensor in given if tensor is not reset} == {self.scale.dtype}
        return super().forward(x, state, reset)


class WithoutParameters(Accumulator):
    """Has its device and dtype from its state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.zeros((), dtype=torch.float64))
        del self.scale
        self.scale = 1.0  # type: ignore[assignment]

    def _zeros(self, *shape: int) -> Tensor:
        like: Any = self.like
        return like.new_zeros(shape)  # type: ignore[no-any-return]

    def update(self, total: Tensor, x: Tensor) -> Tensor:
        assert total.dtype == x.dtype
        return super().update(total, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset", [None, torch.zeros(3, 7, dtype=torch.bool)])
def test_the_check_runs_on_the_device_and_in_the_dtype_of_the_core(
    dtype: torch.dtype, reset: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # there is always this other device, but it has no values to compare
    monkeypatch.setattr(laws, "_is_equal", lambda one, other: one.device == other.device == torch.device("meta"))
    monkeypatch.setattr(laws, "_is_zero", lambda tensors: {tensor.device.type for tensor in tensors} == {"meta"})
    monkeypatch.setattr(laws, "_largest", lambda tensor: 0.0 if tensor.device.type == "meta" else float("nan"))
    check_memory_laws(OnItsDevice().to("meta", dtype), reset=reset)


def test_core_without_parameters_is_checked_in_the_dtype_of_its_state() -> None:
    check_memory_laws(WithoutParameters())


class RunsBackInTime(Accumulator):
    """Weighs what comes later with zero, which NaN outlives."""

    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state, reset)
        return y + 0.0 * x.sum(1, keepdim=True), state


def test_core_in_which_what_is_spoilt_goes_back_in_time_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"spoilt \(by nan\): output is off by nan"):
        check_memory_laws(RunsBackInTime())


def test_broken_laws_are_caught_where_python_leaves_assertions_out() -> None:
    source = Path(laws.__file__).read_text(encoding="utf-8")
    optimized: dict[str, Any] = {"__name__": "optimized"}
    exec(compile(source, laws.__file__, "exec", optimize=1), optimized)
    for broken in (IgnoresResets, MixesRows, StartsAtOne, WritesIntoTheState):
        with pytest.raises(AssertionError):
            optimized["check_memory_laws"](broken())


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (IgnoresResets, "reset"),
        (ScalesInsteadOfEmptying, "reset"),
        (MixesRows, "rows"),
        (DetachesState, "carry|split"),
        (ForgetsBetweenCalls, "carry"),
        (StartsAtOne, "zeros"),
        (WritesIntoTheState, "must not be changed"),
    ],
)
def test_core_that_breaks_a_law_is_caught(broken: type[Accumulator], law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_memory_laws(broken())


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 7), (3, 1)])
def test_sizes_that_show_nothing_are_refused(batch_size: int, steps: int) -> None:
    with pytest.raises(ValueError, match="must be at least 2"):
        check_memory_laws(Accumulator(), batch_size=batch_size, steps=steps)


def test_tolerance_of_zero_is_one() -> None:
    core = perturbed("xlstm", SMALL | {"blocks": "m"}, torch.float32)
    with pytest.raises(AssertionError):
        check_memory_laws(core, steps=20, tolerance=0.0)


def test_reset_is_checked_even_where_no_episode_starts() -> None:
    core = perturbed("xlstm", SMALL | {"blocks": "m"}, torch.float32)
    x, state = torch.randn(2, 5, 5), core.initial_state(2)
    with pytest.raises(TypeError, match=r"reset has dtype torch.float32; allowed is torch.bool"):
        core(x, state, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"reset has shape \(7,\); allowed is \(2, 5\)"):
        core(x, state, torch.zeros(7, dtype=torch.bool))
