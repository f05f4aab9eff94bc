"""A compiled step of a block equals the same step in torch operations, and steps aside where it has to."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from tests.conftest import assert_close
from xlstm_rl.kernels import cpp_extension
from xlstm_rl.kernels.cpp_blocks import block_step
from xlstm_rl.kernels.recording import recorded_calls
from xlstm_rl.memory import MemoryCore, fast, leaves, make_memory, map_leaves
from xlstm_rl.memory.mlstm_block import MLSTMBlock
from xlstm_rl.memory.xlstm import XLSTM

pytestmark = pytest.mark.skipif(cpp_extension.extension().module is None, reason="the compiled kernels are not built")

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "without conv": {"conv_kernel": 0},
    "conv of the current step, biases": {"conv_kernel": 1, "bias": True},
    "long conv, large q, k, v blocks": {"conv_kernel": 6, "qkv_block_size": 8},
    "sigmoid input gate, soft cap": {"input_activation": "sigmoid", "gate_soft_cap": 5.0},
    "memory mixing, biases": {"recurrent_std": 1.0, "bias": True},
    "without FFN": {"ffn_factor": 0.0},
    "other heads and conv in sLSTM blocks": {"recurrent_std": 1.0, "slstm_num_heads": 3, "slstm_conv_kernel": 2},
    # With biases as large as those of sigmoid gates memories would grow a thousandfold, and with them what cancels in
    # the gradient by the normalizer, which the norm of a head makes vanish.
    "exponential forget gate": {"forget_activation": "exp", "mlstm_forget_bias": (-2.0, 0.5)},
}
every_block = pytest.mark.parametrize("blocks", ["m", "s", "ms"])


def perturbed(blocks: str, dtype: torch.dtype = torch.float64, **config: Any) -> MemoryCore:
    """A core with every parameter moved, so that no zero init hides a mistake."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"defaults": "paper", "init": "recall", "hidden_size": 24, "num_heads": 2}
    core = make_memory("xlstm", 5, blocks=blocks, **(settings | config)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return core


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Takes the step of a core with the compiled steps switched off."""

    def call(core: MemoryCore, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(fast, "can_step", lambda x: False)
            return core.step(*arguments, **options)

    return call


@pytest.fixture
def compiled_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the kind of every compiled step that is taken."""
    taken: list[str] = []

    def watched(kind: str, *arguments: Any) -> Any:
        result = block_step(kind, *arguments)  # type: ignore[arg-type]
        if result is not None:
            taken.append(kind[0])
        return result

    monkeypatch.setattr(fast, "block_step", watched)
    return taken


@torch.no_grad()
@pytest.mark.parametrize("label", CONFIGS)
@every_block
@pytest.mark.parametrize("B", (1, 3, 17, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_compiled_step_equals_torch(
    label: str, blocks: str, B: int, dtype: torch.dtype, in_torch: Callable[..., Any], compiled_steps: list[str]
) -> None:
    core = perturbed(blocks, dtype, **CONFIGS[label])
    _, state = core(random(B, 3, 5, dtype=dtype), core.initial_state(B))
    x = random(B, 5, dtype=dtype, seed=2)
    for reset in (None, torch.arange(B) % 3 == 0):
        compiled_steps.clear()
        assert_close(core.step(x, state, reset), in_torch(core, x, state, reset))
        assert compiled_steps == list(blocks)


@torch.no_grad()
@every_block
@pytest.mark.parametrize("reset", (None, torch.tensor([True, False, False])))
def test_step_equals_a_sequence_of_one(blocks: str, reset: Tensor | None, compiled_steps: list[str]) -> None:
    core = perturbed(blocks)
    x, state = random(3, 5), core(random(3, 3, 5), core.initial_state(3))[1]
    y, new = core.step(x, state, reset)
    assert compiled_steps == list(blocks)
    expected, expected_state = core(x.unsqueeze(1), state, None if reset is None else reset.unsqueeze(1))
    assert_close((y, new), (expected.squeeze(1), expected_state))
    assert [type(block) for block in new] == [type(block) for block in expected_state]


@torch.no_grad()
@every_block
def test_hooks_are_called_at_every_step(blocks: str) -> None:
    core: Any = perturbed(blocks)
    x, state, called = random(3, 5), core.initial_state(3), []
    core.step(x, state)
    for module in (core, *core.blocks):
        module.register_forward_hook(lambda module, inputs, output: called.append((module, output[0].shape)))
    core.step(x, state)
    assert called == [*((block, (3, 1, 24)) for block in core.blocks), (core, (3, 1, 24))]


class Louder(XLSTM):
    """A memory whose forward pass does more."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        y, state = super().forward(*arguments, **options)
        return 2 * y, state


class LouderBlock(MLSTMBlock):
    """A block whose forward pass does more."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        y, state = super().forward(*arguments, **options)
        return 2 * y, state


class Wrapper(nn.Module):
    """Around a block, as adapters are."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any, **options: Any) -> Any:
        y, state = self.block(*arguments, **options)
        return 2 * y, state


def _another_memory(core: Any) -> Any:
    return _with_weights(Louder(5, core.config).double(), core)


def _another_block(core: Any) -> Any:
    core.blocks[0] = _with_weights(LouderBlock(core.config, 0).double(), core.blocks[0])
    return core


def _wrapped_block(core: Any) -> Any:
    core.blocks[0] = Wrapper(core.blocks[0])
    return core


def _patched_block(core: Any) -> Any:
    forward = core.blocks[0].forward
    core.blocks[0].forward = lambda *arguments, **options: (2 * forward(*arguments, **options)[0], arguments[1])
    return core


def _patched_memory(core: Any) -> Any:
    forward = core.forward
    core.forward = lambda *arguments, **options: (2 * forward(*arguments, **options)[0], arguments[1])
    return core


def _with_weights(new: Any, old: Any) -> Any:
    new.load_state_dict(old.state_dict())
    return new


@torch.no_grad()
@pytest.mark.parametrize("change", [_another_memory, _another_block, _wrapped_block, _patched_block, _patched_memory])
def test_step_is_that_of_a_changed_forward_pass(change: Callable[[Any], Any]) -> None:
    core = perturbed("ms")
    x, state = random(3, 5), core(random(3, 3, 5), core.initial_state(3))[1]
    plain, _ = core.step(x, state)
    changed = change(core)
    y, new = changed.step(x, state)
    expected, expected_state = changed(x.unsqueeze(1), state)
    assert_close((y, new), (expected.squeeze(1), expected_state))
    assert not torch.allclose(y, plain)


@torch.no_grad()
@every_block
def test_hooks_of_all_modules_are_called_at_every_step(blocks: str) -> None:
    core: Any = perturbed(blocks)
    x, state, called = random(3, 5), core.initial_state(3), []
    handle = register_module_forward_pre_hook(lambda module, inputs: called.append(module))
    try:
        core.step(x, state)
    finally:
        handle.remove()
    assert set(called) >= {core, *core.blocks}


@torch.no_grad()
@every_block
@pytest.mark.parametrize(
    ("reset", "error", "match"),
    [
        (torch.zeros(3), TypeError, "dtype torch.float32"),
        (torch.zeros(2, dtype=torch.bool), ValueError, r"\(2,\); allowed is \(3,\)"),
    ],
)
def test_step_refuses_a_reset_that_does_not_fit(blocks: str, reset: Tensor, error: type[Exception], match: str) -> None:
    core: Any = perturbed(blocks)
    with pytest.raises(error, match=match):
        core.step(random(3, 5), core.initial_state(3), reset)
    with pytest.raises(error):
        core.blocks[0].step(random(3, 24), core.initial_state(3)[0], reset)


@torch.no_grad()
@every_block
@pytest.mark.parametrize("biases", (False, True))
def test_compiled_step_reads_tensors_by_their_methods_where_torch_has_no_table(
    blocks: str, biases: bool, in_torch: Callable[..., Any], compiled_steps: list[str]
) -> None:
    core = perturbed(blocks, bias=biases)
    _, state = core(random(3, 3, 5), core.initial_state(3))
    module = cpp_extension.compiled()
    assert not cpp_extension.use_tensors(module, exchange=False)
    try:
        for reset in (None, torch.tensor([True, False, False])):
            compiled_steps.clear()
            arguments = (random(3, 5, seed=2), state, reset)
            assert_close(core.step(*arguments), in_torch(core, *arguments))
            assert compiled_steps == list(blocks)
    finally:
        cpp_extension.use_tensors(module)


@torch.no_grad()
@every_block
def test_compiled_step_copies_tensors_that_do_not_lie_in_order(
    blocks: str, in_torch: Callable[..., Any], compiled_steps: list[str]
) -> None:
    core: Any = perturbed(blocks)
    state = core(random(4, 3, 5), core.initial_state(4))[1]
    spread = map_leaves(lambda leaf: torch.stack((leaf, leaf), dim=-1)[..., 0], state)
    x, reset = random(5, 4).T, torch.tensor([[True, False]] * 4)[:, 0]
    for reuse_state in (False, True):
        compiled_steps.clear()
        assert_close(core.step(x, spread, reset, reuse_state=reuse_state), in_torch(core, x, state, reset))
        assert compiled_steps == list(blocks)


@torch.no_grad()
@every_block
@pytest.mark.parametrize("width", (8, 64, 72))
def test_compiled_step_fits_any_width(blocks: str, width: int, in_torch: Callable[..., Any]) -> None:
    core = perturbed(blocks, hidden_size=width, num_heads=4)
    arguments = (random(4, 5), core.initial_state(4))
    assert_close(core.step(*arguments), in_torch(core, *arguments))


@torch.no_grad()
@every_block
def test_compiled_step_leaves_its_arguments_alone(blocks: str) -> None:
    core = perturbed(blocks)
    state = core(random(2, 3, 5), core.initial_state(2))[1]
    before = [[leaf.clone() for leaf in (*block.cell, block.window)] for block in state]
    core.step(random(2, 5), state, torch.tensor([True, False]))
    assert_close([[*block.cell, block.window] for block in state], before)


@torch.no_grad()
@every_block
def test_compiled_step_sees_every_change_of_the_weights(blocks: str, in_torch: Callable[..., Any]) -> None:
    core = perturbed(blocks)
    arguments = (random(2, 5), core.initial_state(2))
    core.step(*arguments)
    for parameter in core.parameters():
        parameter.mul_(1.1)
        parameter.data.add_(0.01)
        parameter.data = parameter.data.clone() * 0.9
    assert_close(core.step(*arguments), in_torch(core, *arguments))


@torch.no_grad()
def test_spoilt_state_of_a_row_ends_with_its_episode() -> None:
    core = perturbed("ms")
    state = core(random(2, 3, 5), core.initial_state(2))[1]
    for block in state:
        for leaf in (*block.cell, block.window):
            leaf[0] = float("nan")
    y, _ = core.step(random(2, 5), state, torch.tensor([True, False]))
    assert bool(y.isfinite().all())


@torch.no_grad()
def test_threads_do_not_change_the_step() -> None:
    core = perturbed("ms")
    arguments = (random(70, 5), core.initial_state(70))
    expected = core.step(*arguments)
    torch.set_num_threads(3)
    try:
        assert_close(core.step(*arguments), expected)
    finally:
        torch.set_num_threads(1)


@every_block
def test_step_with_gradients_is_taken_in_torch(blocks: str, compiled_steps: list[str]) -> None:
    core = perturbed(blocks)
    core.step(random(2, 5), core.initial_state(2))[0].sum().backward()  # type: ignore[no-untyped-call]
    assert compiled_steps == []
    assert all(parameter.grad is not None for parameter in core.parameters())


@torch.no_grad()
def test_step_with_dropout_is_taken_in_torch(compiled_steps: list[str]) -> None:
    core = perturbed("ms", dropout=0.5)
    arguments = (random(2, 5), core.initial_state(2))
    core.step(*arguments)
    assert compiled_steps == []
    core.eval()
    core.step(*arguments)
    assert compiled_steps == ["m", "s"]


def run_as(T: int, core: MemoryCore, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
    """A sequence x [B, T, 5]; of one step as a step."""
    if T > 1:
        return core(x, state, reset)  # type: ignore[no-any-return]
    y, state = core.step(x.squeeze(1), state, None if reset is None else reset.squeeze(1))
    return y[:, None], state


class Doubled(nn.Linear):
    """A linear layer that does more than its weights tell."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _wrap_down(block: Any) -> None:
    block.down = nn.Sequential(block.down, nn.Identity())


def _replace_nested_layer(block: Any) -> None:
    block.ffn.up = Doubled(24, 64, bias=False).double()


def _prune(block: Any) -> None:
    layer = block.up if hasattr(block, "up") else block.ffn.up
    prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]


def _parametrize(block: Any) -> None:
    layer = block.down if hasattr(block, "down") else block.ffn.down
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


def _no_norm_weight(block: Any) -> None:
    block.norm.weight = None


def _norm_with_bias(block: Any) -> None:
    block.norm = nn.LayerNorm(24).double()
    block.norm.bias.fill_(1.0)


def _norm_with_another_epsilon(block: Any) -> None:
    block.norm = nn.LayerNorm(24, bias=False, eps=1.0).double()


def _epsilon_of_a_norm(block: Any) -> None:
    block.norm.eps = 1.0


def _epsilon_of_the_norm_of_heads(block: Any) -> None:
    block.head_norm.eps = 1.0


def _epsilon_of_the_last_norm(block: Any) -> None:
    block.ffn_norm.eps = 1.0


def _bias_for_a_norm(block: Any) -> None:
    block.norm.bias = nn.Parameter(torch.ones(24, dtype=torch.float64))


def _dropout(block: Any) -> None:
    block.dropout = nn.Dropout(0.5)


def _subclass(block: Any) -> None:
    weight = block.head_norm.weight.detach()
    block.head_norm.weight = nn.Parameter(TwoTensor(weight, weight.clone()))  # type: ignore[no-untyped-call]


def _another_shape(block: Any) -> None:
    block.head_norm.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize(
    ("blocks", "change"),
    [
        ("m", _wrap_down),
        ("s", _replace_nested_layer),
        ("s", _epsilon_of_the_last_norm),
        *itertools.product(
            "ms",
            (
                *(_prune, _parametrize, _no_norm_weight, _norm_with_bias, _norm_with_another_epsilon, _subclass),
                *(_epsilon_of_a_norm, _epsilon_of_the_norm_of_heads, _bias_for_a_norm),
                *(_dropout, _another_shape),
            ),
        ),
    ],
)
@pytest.mark.parametrize("T", (1, 5))
def test_changed_layers_are_called_in_torch(
    blocks: str, change: Callable[[Any], None], T: int, compiled_steps: list[str]
) -> None:
    core: Any = perturbed(blocks)
    x, state = random(2, T, 5), core.initial_state(2)
    run_as(T, core, x, state)
    compiled_steps.clear()
    change(core.blocks[0])
    torch.manual_seed(0)
    y, _ = run_as(T, core, x, state)
    assert compiled_steps == []
    with recorded_calls():  # sets the compiled blocks aside
        torch.manual_seed(0)
        expected, _ = run_as(T, core, x, state)
    y, expected = (value.a if isinstance(value, TwoTensor) else value for value in (y, expected))
    assert_close(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("T", (1, 5))
@every_block
def test_freed_weight_is_refused_as_in_torch(blocks: str, T: int) -> None:
    core: Any = perturbed(blocks)
    arguments = (T, core, random(2, T, 5), core.initial_state(2))
    run_as(*arguments)
    for block in core.blocks:
        layer = block.up if hasattr(block, "up") else block.ffn.up
        layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        run_as(*arguments)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("T", (1, 5))
@every_block
def test_forward_mode_derivatives_are_those_of_a_difference(blocks: str, T: int) -> None:
    core = perturbed(blocks)
    state = core(random(2, 3, 5), core.initial_state(2))[1]
    x, direction = random(2, T, 5), random(2, T, 5, seed=2)
    with forward_ad.dual_level():
        y, _ = run_as(T, core, forward_ad.make_dual(x, direction), state)  # type: ignore[no-untyped-call]
        tangent = forward_ad.unpack_dual(y).tangent  # type: ignore[no-untyped-call]
    step = 1e-6
    difference = (core(x + step * direction, state)[0] - core(x - step * direction, state)[0]) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("T", (1, 5))
@every_block
def test_traced_graph_holds_for_other_inputs(blocks: str, T: int) -> None:
    core = perturbed(blocks)
    state = core.initial_state(2)
    reset = torch.zeros(2, T, dtype=torch.bool)
    graph = make_fx(lambda x, reset: run_as(T, core, x, state, reset)[0])(random(2, T, 5), reset)
    x, reset = random(2, T, 5, seed=2), torch.arange(2 * T).view(2, T) % 3 == 1
    assert_close(graph(x, reset), run_as(T, core, x, state, reset)[0])


@torch.no_grad()
@pytest.mark.parametrize("T", (1, 5))
@every_block
def test_vmap_over_rows_equals_the_batch(blocks: str, T: int) -> None:
    core = perturbed(blocks)
    x, state = random(3, T, 5), core(random(3, 3, 5), core.initial_state(3))[1]
    reset = torch.arange(3 * T).view(3, T) % 4 == 1

    def row(x: Tensor, state: Any, reset: Tensor) -> Tensor:
        return run_as(T, core, x[None], map_leaves(lambda leaf: leaf[None], state), reset[None])[0][0]

    assert_close(torch.func.vmap(row)(x, state, reset), run_as(T, core, x, state, reset)[0])


@torch.no_grad()
@every_block
def test_replaced_layer_of_the_same_kind_is_seen(blocks: str, in_torch: Callable[..., Any]) -> None:
    core: Any = perturbed(blocks)
    arguments = (random(2, 5), core.initial_state(2))
    core.step(*arguments)
    for block in core.blocks:
        if hasattr(block, "ffn"):
            block.ffn.up = nn.Linear(24, 64, bias=False).double()
            block.recurrent = nn.Parameter(torch.randn_like(block.recurrent))
        else:
            block.down = nn.Linear(48, 24, bias=True).double()
    assert_close(core.step(*arguments), in_torch(core, *arguments))


@torch.no_grad()
@pytest.mark.parametrize("blocks", ["m", "s"])
def test_weight_transposed_where_it_lies_is_seen(
    blocks: str, in_torch: Callable[..., Any], compiled_steps: list[str]
) -> None:
    core: Any = perturbed(blocks)
    arguments = (random(2, 5), core(random(2, 3, 5), core.initial_state(2))[1])
    core.step(*arguments)
    weight = core.blocks[0].value.weight if blocks == "m" else core.blocks[0].recurrent
    compiled_steps.clear()
    weight.data = weight.data.transpose(-1, -2)
    assert_close(core.step(*arguments), in_torch(core, *arguments))
    assert compiled_steps == []


@torch.no_grad()
@every_block
def test_copies_step_with_their_own_weights(blocks: str, in_torch: Callable[..., Any]) -> None:
    core = perturbed(blocks)
    arguments = (random(2, 5), core.initial_state(2))
    core.step(*arguments)
    for copied in (copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        assert_close(copied.step(*arguments), in_torch(copied, *arguments))


@torch.no_grad()
def test_state_of_another_dtype_is_refused_as_in_torch(compiled_steps: list[str]) -> None:
    core = perturbed("m")
    with pytest.raises((RuntimeError, TypeError)):
        core.step(random(2, 5), perturbed("m", torch.float32).initial_state(2))
    assert compiled_steps == []


@torch.no_grad()
@every_block
def test_input_of_another_dtype_is_refused_as_in_torch(blocks: str, compiled_steps: list[str]) -> None:
    core: Any = perturbed(blocks)
    block = core.blocks[0]
    with pytest.raises(RuntimeError, match="dtype|Float|Double"):
        block.step(random(2, 24, dtype=torch.float32), perturbed(blocks, torch.float32).initial_state(2)[0])
    assert compiled_steps == []


@torch.no_grad()
@every_block
@pytest.mark.parametrize("compiled", (True, False))
def test_steps_over_the_old_state_equal_steps_beside_it(
    blocks: str, compiled: bool, in_torch: Callable[..., Any]
) -> None:
    core = perturbed(blocks)
    beside, over = (core(random(20, 3, 5), core.initial_state(20))[1] for _ in range(2))
    reset = torch.arange(20) % 4 == 0
    for seed in range(3):
        x = random(20, 5, seed=seed)
        y, beside = core.step(x, beside, reset)
        arguments = (x, over, reset)
        step = core.step if compiled else functools.partial(in_torch, core)
        again, over = step(*arguments, reuse_state=True)
        assert_close((again, over), (y, beside))


@torch.no_grad()
def test_permission_to_write_over_the_state_is_used() -> None:
    core = perturbed("ms")
    state = core.initial_state(2)
    _, new = core.step(random(2, 5), state, reuse_state=True)
    assert [leaf.data_ptr() for leaf in leaves(new)] == [leaf.data_ptr() for leaf in leaves(state)]
