"""What is added to a layer of a stack, hooks and the like, acts in steps as it acts in sequences."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.modules.module as of_all_modules
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.conftest import assert_close
from xlstm_rl.kernels.recording import recorded_calls
from xlstm_rl.memory import MemoryCore, make_memory

WIDTH = 16
LAYERS = {
    "m": ("", "norm", "up", "conv", "query_key", "value", "gates", "head_norm", "down", "dropout"),
    "s": (
        *("", "norm", "conv", "input_forget", "cell_output", "head_norm", "dropout", "ffn_norm", "ffn"),
        *("ffn.up", "ffn.down"),
    ),
    # whose gates are one product
    "s with one head": ("norm", "input_forget", "cell_output", "head_norm"),
}
PLACES = [(letter, name) for letter, names in LAYERS.items() for name in names]
every_place = pytest.mark.parametrize(("letter", "name"), PLACES)


def core_of(letter: str) -> Any:
    torch.manual_seed(0)
    one_head: dict[str, Any] = {"slstm_num_heads": 1, "slstm_conv_kernel": 0} if letter == "s with one head" else {}
    settings: dict[str, Any] = {"hidden_size": WIDTH, "blocks": letter[0], "num_heads": 2, "recurrent_std": 1.0}
    core = make_memory("xlstm", 4, defaults="paper", **settings, **one_head)
    core = core.double()
    with torch.no_grad():
        for parameter in core.parameters():
            # gates start at zero, where what is added to their inputs does nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    return core


def stepped(core: MemoryCore, x: Tensor, state: Any) -> Tensor:
    """Outputs [B, T, width] of single steps."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = core.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def in_layers(core: MemoryCore, x: Tensor, state: Any) -> Tensor:
    """Outputs of a sequence by its layers alone: the compiled blocks step aside where calls are recorded."""
    with recorded_calls():
        y: Tensor = core(x, state)[0]
    return y


def assert_acts_everywhere(core: MemoryCore, change: Callable[[], Any]) -> None:
    """The change changes the layers, and steps and sequences, with gradients or without, change as these do."""
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    state = core.initial_state(2)
    with torch.no_grad():
        plain = stepped(core, x, state)
        change()
        expected = in_layers(core, x, state)
        assert not torch.allclose(plain, expected)
        assert_close(stepped(core, x, state), expected)
        assert_close(core(x, state)[0], expected)
    assert_close(core(x, state)[0], expected)


def by_half(output: Any) -> Any:
    """Half of a layer's output; of an output with a state, of the output alone."""
    return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5


@every_place
def test_forward_hook_acts_in_steps(letter: str, name: str) -> None:
    core = core_of(letter)
    layer = core.blocks[0].get_submodule(name)
    assert_acts_everywhere(core, lambda: layer.register_forward_hook(lambda module, inputs, output: by_half(output)))


@every_place
def test_forward_pre_hook_acts_in_steps(letter: str, name: str) -> None:
    core = core_of(letter)
    layer = core.blocks[0].get_submodule(name)
    # not by a factor, which a norm would take out again
    shift = torch.linspace(-1, 1, 3 * 2 * WIDTH, dtype=torch.float64)
    assert_acts_everywhere(
        core,
        lambda: layer.register_forward_pre_hook(
            lambda module, inputs: (inputs[0] + shift[: inputs[0].shape[-1]], *inputs[1:])
        ),
    )


@every_place
def test_forward_pass_of_an_instance_acts_in_steps(letter: str, name: str) -> None:
    core = core_of(letter)
    layer = core.blocks[0].get_submodule(name)
    forward = layer.forward
    assert_acts_everywhere(core, lambda: setattr(layer, "forward", lambda *arguments: by_half(forward(*arguments))))


@every_place
def test_forward_pass_put_into_a_class_acts_in_steps(letter: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(letter)
    kind = type(core.blocks[0].get_submodule(name))
    forward = kind.forward
    assert_acts_everywhere(
        core, lambda: monkeypatch.setattr(kind, "forward", lambda *arguments: by_half(forward(*arguments)))
    )


@every_place
def test_subclass_acts_in_steps(letter: str, name: str) -> None:
    core = core_of(letter)
    layer = core.blocks[0].get_submodule(name)
    kind = type(layer)

    def forward(*arguments: Any) -> Any:
        return by_half(kind.forward(*arguments))

    assert_acts_everywhere(core, lambda: setattr(layer, "__class__", type("Halved", (kind,), {"forward": forward})))


WEIGHTS = [(letter, name) for letter, name in PLACES if name not in ("", "dropout", "ffn")]
OF_BLOCKS = [("m", "skip"), ("s", "recurrent"), ("s", "gate_bias")]


@pytest.mark.parametrize(
    ("letter", "name", "weight"),
    [*((letter, name, "weight") for letter, name in WEIGHTS), *((letter, "", weight) for letter, weight in OF_BLOCKS)],
)
def test_parametrization_acts_in_steps(letter: str, name: str, weight: str) -> None:
    core = core_of(letter)
    layer = core.blocks[0].get_submodule(name)

    class Shifted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)

    assert_acts_everywhere(core, lambda: parametrize.register_parametrization(layer, weight, Shifted()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "normalize",
    (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ),
)
@pytest.mark.parametrize(("letter", "name"), [("m", "up"), ("m", "gates"), ("s", "ffn.up"), ("s", "ffn.down")])
def test_normalized_weights_act_in_steps(letter: str, name: str, normalize: Callable[[nn.Module], Any]) -> None:
    core = core_of(letter).eval()
    layer = core.blocks[0].get_submodule(name)

    def change() -> None:
        normalize(layer)
        with torch.no_grad():
            for parameter in layer.parameters():
                # what the norm is multiplied with, or the weight before: halving acts on one of them only
                parameter.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter))

    assert_acts_everywhere(core, change)


@contextmanager
def hook_of_all_modules(register: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = getattr(of_all_modules, register)(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("letter", LAYERS)
@pytest.mark.parametrize("register", ("register_module_forward_hook", "register_module_forward_pre_hook"))
def test_hooks_of_all_modules_are_called_for_every_layer(letter: str, register: str) -> None:
    core, called = core_of(letter), set[nn.Module]()
    x, state = torch.randn(2, 3, 4, dtype=torch.float64), core.initial_state(2)
    expected = {module for module in core.modules() if not isinstance(module, nn.ModuleList)}
    with hook_of_all_modules(register, lambda module, *_: called.add(module)):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                core.step(x[:, 0], state)
                assert called == expected, "in a step"
                called.clear()
                core(x, state)
                assert called == expected, "in a sequence"
                called.clear()


@every_place
@pytest.mark.parametrize("kind", ("register_full_backward_hook", "register_full_backward_pre_hook"))
def test_backward_hook_is_called_in_sequences_and_steps(letter: str, name: str, kind: str) -> None:
    core, called = core_of(letter), set[nn.Module]()
    getattr(core.blocks[0].get_submodule(name), kind)(lambda module, *gradients: called.add(module))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for y in (core(x, core.initial_state(2))[0], core.step(x[:, 0], core.initial_state(2))[0]):
        y.sum().backward()
        assert called, f"for outputs {tuple(y.shape)}"
        called.clear()


@pytest.mark.parametrize("letter", LAYERS)
@pytest.mark.parametrize("kind", ("register_module_full_backward_hook", "register_module_full_backward_pre_hook"))
def test_backward_hooks_of_all_modules_are_called_for_every_layer(letter: str, kind: str) -> None:
    core, called = core_of(letter), set[nn.Module]()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with hook_of_all_modules(kind, lambda module, *_: called.add(module)):
        core(x, core.initial_state(2))[0].sum().backward()
    assert called == {module for module in core.modules() if not isinstance(module, nn.ModuleList)}


@pytest.mark.parametrize("letter", LAYERS)
@pytest.mark.parametrize("name", ("", "input_projection", "post_norm"))
def test_hook_on_the_stack_acts_in_steps(letter: str, name: str) -> None:
    core = core_of(letter)
    part = core.get_submodule(name)
    assert_acts_everywhere(core, lambda: part.register_forward_hook(lambda module, inputs, output: by_half(output)))


@pytest.mark.parametrize("letter", LAYERS)
def test_what_is_taken_away_again_no_longer_acts(letter: str) -> None:
    core = core_of(letter)
    x, state = torch.randn(2, 3, 4, dtype=torch.float64), core.initial_state(2)
    with torch.no_grad():
        plain = stepped(core, x, state)
        handle = core.blocks[0].norm.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not torch.allclose(stepped(core, x, state), plain)
        handle.remove()
        assert torch.equal(stepped(core, x, state), plain)


def test_gates_in_one_product_are_those_of_the_layers() -> None:
    core = core_of("s with one head")
    x, outer = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, WIDTH, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(core(x, core.initial_state(2))[0], [*core.parameters()], outer)

    at_once = gradients()
    seen: list[Any] = []
    core.blocks[0].input_forget.register_forward_hook(lambda *given: seen.append(given))
    assert_close(at_once, gradients())
    assert len(seen) == 1
