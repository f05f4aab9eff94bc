"""Compiled forms of whole blocks: whether they may stand in for the layers, and where these hold their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from operator import attrgetter, contains, is_not
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import torch.nn.modules.module as of_all_modules
from torch import Tensor, nn

from xlstm_rl.kernels import MLSTMState, SLSTMState
from xlstm_rl.kernels.cpp_blocks import (
    Kind,
    MLSTMOptions,
    MLSTMSizes,
    MLSTMWeights,
    Place,
    SLSTMOptions,
    SLSTMSizes,
    StepPlan,
    block_step,
    can_step,
    mlstm_plan,
    slstm_plan,
)
from xlstm_rl.kernels.cpp_extension import extension
from xlstm_rl.kernels.cpp_mixer import can_mix, mlstm_mixer
from xlstm_rl.kernels.linear import linear
from xlstm_rl.kernels.tracing import traced
from xlstm_rl.memory.config import XLSTMConfig
from xlstm_rl.memory.core import MemoryBlock
from xlstm_rl.memory.layers import BlockLinear, CausalConv, GatedFeedForward, HeadNorm, Linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL_MODULES = tuple(getattr(of_all_modules, f"_global{name}") for name in _HOOKS)
# The forward passes that the compiled ones stand in for, before anybody replaces one in its class.
_WRITTEN: dict[type[nn.Module], Any] = {
    layer: layer.forward
    for layer in (
        *(nn.Linear, nn.LayerNorm, nn.Dropout, nn.LSTM, nn.GRU, nn.Flatten),
        *(nn.Sequential, nn.Tanh, nn.ReLU, nn.Identity),
        *(BlockLinear, CausalConv, GatedFeedForward, HeadNorm, Linear),
    )
}
_forward_of = attrgetter("forward")


def stands_for(module: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: the forward pass that the class has now is the one that fast paths step around."""
    _WRITTEN[module] = module.forward
    return module


class Watched(NamedTuple):
    """Modules that a fast path steps around, and all places where something may be added to a call of them."""

    modules: tuple[nn.Module, ...]
    types: tuple[type, ...]
    """Of the modules: a parametrization changes that of a module where it is."""
    hooks: tuple[Mapping[int, Any], ...]
    attributes: tuple[Mapping[str, Any], ...]
    kinds: tuple[type[nn.Module], ...]
    """The types, each once."""
    written: tuple[Any, ...]
    """Forward passes of the kinds; None for those of subclasses, which may do anything."""

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Watched:
        """Note the places; they stay the same for as long as the modules do."""
        modules = tuple(modules)
        types = tuple(map(type, modules))
        kinds = tuple(dict.fromkeys(types))
        return cls(
            modules,
            types,
            (*_HOOKS_OF_ALL_MODULES, *(getattr(module, name) for module in modules for name in _HOOKS)),
            tuple(module.__dict__ for module in modules),
            kinds,
            tuple(map(_WRITTEN.get, kinds)),
        )

    def is_bare(self) -> bool:
        """Whether calling each module does what its class and its weights say, and nothing else.

        Hooks of any kind, also those of all modules, forward passes replaced in a module or in its class, modules
        compiled by `torch.compile` and subclasses, which parametrizations are too, all do more.
        """
        module = extension().module
        if module is not None:
            # a tenth of the time: acting asks this at every step of every block
            bare: bool = module.bare(self.hooks, self.modules, self.types, self.attributes, self.kinds, self.written)
            return bare
        return not (
            any(self.hooks)
            or any(map(is_not, map(type, self.modules), self.types))
            or any(map(contains, self.attributes, repeat("forward")))
            or any(map(contains, self.attributes, repeat("_compiled_call_impl")))
            or tuple(map(_forward_of, self.kinds)) != self.written
        )


class _Alone(NamedTuple):
    """What is known of a module without what it holds."""

    kind: type[nn.Module]
    watched: Watched
    """Without the module itself, which would never be let go of."""


_alone: WeakKeyDictionary[nn.Module, _Alone] = WeakKeyDictionary()


def is_bare(module: nn.Module) -> bool:
    """`Watched.is_bare` of one module, which is not looked into."""
    known = _alone.get(module)
    if known is None:
        known = _alone[module] = _Alone(type(module), Watched.of((module,))._replace(modules=(), types=()))
    return type(module) is known.kind and known.watched.is_bare()


class _Network(NamedTuple):
    """What is known of a `nn.Sequential`, or of a layer."""

    kind: type[nn.Module]
    layers: tuple[nn.Module, ...]
    """Of a `nn.Sequential`."""
    watched: Watched
    """The layers, and the network but for itself, which would never be let go of."""
    functions: tuple[Callable[[Tensor], Tensor], ...] | None
    """What the layers do; None where one of them is of another kind than those known here."""


_networks: WeakKeyDictionary[nn.Module, _Network] = WeakKeyDictionary()


def run_network(network: nn.Module, x: Tensor) -> Tensor:
    """`network(x)`, of small networks in acting twice as fast: a call of a module takes as long as a small product.

    Args:
        network: any; a linear map, a norm or an activation, or a `nn.Sequential` of such, is not called, but what it
            does is done, as long as nothing is added to it.
        x: [..., features].
    """
    if traced():
        return network(x)  # type: ignore[no-any-return]
    known = _networks.get(network)
    if known is None or tuple(network._modules.values()) != known.layers:
        known = _networks[network] = _know_network(network)
    if known.functions is None or type(network) is not known.kind or not known.watched.is_bare():
        return network(x)  # type: ignore[no-any-return]
    y = x
    try:
        for function in known.functions:
            y = function(y)
    # a weight that is no parameter any more: somebody computes it and sets it as an attribute
    except KeyError:
        return network(x)  # type: ignore[no-any-return]
    return y


def _know_network(network: nn.Module) -> _Network:
    layers = tuple(layer for layer in network._modules.values() if layer is not None)
    watched = Watched.of((network, *layers))
    watched = watched._replace(modules=layers, types=watched.types[1:])
    stages = layers if type(network) is nn.Sequential else (network,)
    known = all(type(layer) in _FUNCTIONS for layer in stages)
    functions = tuple(_FUNCTIONS[type(layer)](layer) for layer in stages) if known else None
    return _Network(type(network), layers, watched, functions)


def _linear_of(layer: Any) -> Callable[[Tensor], Tensor]:
    held = layer._parameters
    return lambda x: linear(x, held["weight"], held["bias"])


def _layer_norm_of(layer: Any) -> Callable[[Tensor], Tensor]:
    held, own = layer._parameters, layer.__dict__
    return lambda x: F.layer_norm(x, own["normalized_shape"], held["weight"], held["bias"], own["eps"])


_FUNCTIONS: dict[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]] = {
    nn.Linear: _linear_of,
    Linear: _linear_of,
    nn.LayerNorm: _layer_norm_of,
    nn.Tanh: lambda layer: torch.tanh,
    nn.ReLU: lambda layer: F.relu,
    nn.Identity: lambda layer: lambda x: x,
}


def teach_layer(kind: type[nn.Module], make: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
    """Let `run_network` know what layers of a kind do: `make(layer)` is the function that their forward pass is now."""
    _WRITTEN[kind] = kind.forward
    _FUNCTIONS[kind] = make


class FastBlock(MemoryBlock):
    """A block with compiled forms, which serve wherever they do the same as its layers."""

    compiled: CompiledBlock

    def step(
        self, x: Tensor, state: Any, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, Any]:
        """See `MemoryBlock.step`."""
        stepped = self.compiled.step(self, x, state, reset, reuse_state)
        return super().step(x, state, reset) if stepped is None else stepped


class _Found(NamedTuple):
    """What was found out about a block with certain layers."""

    layers: tuple[nn.Module | None, ...]
    whole: Watched
    """The block and its layers."""
    inside: Watched
    """The layers alone: a call of the block may be in progress, and its own hooks are served then."""
    places: tuple[Place, ...]
    plan: StepPlan
    plain: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]
    """Of layers that must have no bias, norms with the epsilon of the plan among them: parameters and attributes."""


class CompiledBlock(ABC):
    """The compiled forms of a block; what is found out about its layers is kept until one of them is replaced.

    Args:
        block: as it was made; the layers must be of the same kinds later.
        config: that it was made with.
        state_type: of the block, a named tuple of the state of the cell and the window of the convolution.
    """

    kind: ClassVar[Kind]
    cell_type: ClassVar[Callable[..., Any]]

    def __init__(self, block: MemoryBlock, config: XLSTMConfig, state_type: Callable[..., Any]) -> None:
        self.state_type, self._epsilon = state_type, config.norm_eps
        self._kinds = (type(block), *map(type, self._layers(block)))
        self._found: tuple[tuple[nn.Module | None, ...], _Found | None] = ((), None)

    def step(
        self, block: nn.Module, x: Tensor, state: Any, reset: Tensor | None, reuse_state: bool
    ) -> tuple[Tensor, Any] | None:
        """The step of x [B, width], or None where it has to be taken layer by layer."""
        if not can_step(x) or _drops(block._modules["dropout"]):
            return None
        found = self._find(block)
        if found is None or not found.whole.is_bare():
            return None
        cell, window = state
        leaves = (*cell, window)
        stepped = block_step(self.kind, found.plan, x, leaves, reset, reuse_state)
        if stepped is None:
            return None
        y, new = stepped
        if new is leaves:
            return y, state
        return y, self.state_type(self.cell_type(*new[:-1]), new[-1])

    def may_pass_by_layers(self, block: nn.Module) -> bool:
        """Whether layers of a block in a call of it do what their weights say, and nothing else."""
        found = self._find(block)
        return found is not None and type(block) in _WRITTEN and found.inside.is_bare()

    def _find(self, block: nn.Module) -> _Found | None:
        layers = self._layers(block)
        kept_layers, found = self._found
        if layers != kept_layers:
            found = self._find_anew(block, layers)
            # at once, so that another thread never sees the layers of one and the places of another
            self._found = layers, found
        if found is None or not _are_plain(found.plain, self._epsilon):
            return None
        return found

    def _find_anew(self, block: nn.Module, layers: tuple[nn.Module | None, ...]) -> _Found | None:
        if (type(block), *map(type, layers)) != self._kinds:
            return None
        places = self._places(block)
        plain = tuple((layer._parameters, layer.__dict__) for layer in self._without_bias(block))
        watched = [layer for layer in layers if layer is not None]
        inside = Watched.of(watched)
        return _Found(layers, Watched.of((block, *watched)), inside, places, self._plan(places), plain)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the block has layers of its own, and a file outlives the layout of plans."""
        return self.__dict__ | {"_found": ((), None)}

    def _layers(self, block: nn.Module) -> tuple[nn.Module | None, ...]:
        """All layers, those that others hold among them."""
        return tuple(block._modules.values())

    @abstractmethod
    def _without_bias(self, block: nn.Module) -> tuple[nn.Module, ...]:
        """Layers that the compiled forms know without a bias alone, all norms among them."""

    @abstractmethod
    def _places(self, block: nn.Module) -> tuple[Place, ...]:
        """Where the weights are, in their order."""

    @abstractmethod
    def _plan(self, places: tuple[Place, ...]) -> StepPlan:
        """What a step needs to know of weights at these places."""


class CompiledMLSTM(CompiledBlock):
    """The compiled forms of an mLSTM block: its step, and its mixer, which lies between its projections."""

    kind = "mlstm_block_step"
    cell_type = MLSTMState

    def __init__(self, block: MemoryBlock, config: XLSTMConfig, state_type: Callable[..., Any]) -> None:
        super().__init__(block, config, state_type)
        self.options = MLSTMOptions(
            config.norm_eps, config.gate_soft_cap, config.forget_activation, config.input_activation == "sigmoid"
        )
        self.sizes = MLSTMSizes(
            config.hidden_size, config.inner_size, config.num_heads, config.qkv_block_size, config.conv_kernel
        )

    def mix(self, block: nn.Module, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any] | None:
        """All between the projections, x [B, T, 2 inner] -> [B, T, inner], state; None where layers have to do it."""
        if not can_mix(x):
            return None
        found = self._find(block)
        if found is None or type(block) not in _WRITTEN or not found.inside.is_bare():
            return None
        weights = _weights(found.places)
        if weights is None:
            return None
        mixed = mlstm_mixer(x, weights, self.sizes, state.cell, state.window, reset, self.options)
        if mixed is None:
            return None
        hidden, cell, window = mixed
        return hidden, self.state_type(cell, window)

    def _plan(self, places: tuple[Place, ...]) -> StepPlan:
        return mlstm_plan(self.sizes, self.options, places)

    def _without_bias(self, block: nn.Module) -> tuple[nn.Module, ...]:
        layers: dict[str, Any] = block._modules
        return layers["norm"], layers["head_norm"]

    def _places(self, block: nn.Module) -> tuple[Place, ...]:
        layers: dict[str, Any] = block._modules
        return (
            (layers["norm"]._parameters, "weight"),
            *_parameters_of(layers["up"]),
            *_parameters_of(layers.get("conv")),
            *_parameters_of(layers["query_key"]),
            *_parameters_of(layers["value"]),
            *_parameters_of(layers["gates"]),
            (layers["head_norm"]._parameters, "weight"),
            (block._parameters, "skip"),
            *_parameters_of(layers["down"]),
        )


class CompiledSLSTM(CompiledBlock):
    """The compiled step of an sLSTM block."""

    kind = "slstm_block_step"
    cell_type = SLSTMState

    def __init__(self, block: MemoryBlock, config: XLSTMConfig, state_type: Callable[..., Any]) -> None:
        super().__init__(block, config, state_type)
        self.options = SLSTMOptions(config.norm_eps, config.forget_activation)
        self.sizes = SLSTMSizes(config.hidden_size, config.slstm_heads, config.ffn_size, config.slstm_conv)

    def _layers(self, block: nn.Module) -> tuple[nn.Module | None, ...]:
        """Those of the feed-forward network come last."""
        ffn = block._modules.get("ffn")
        return (*block._modules.values(), *(() if ffn is None else ffn._modules.values()))

    def _plan(self, places: tuple[Place, ...]) -> StepPlan:
        return slstm_plan(self.sizes, self.options, places)

    def _without_bias(self, block: nn.Module) -> tuple[nn.Module, ...]:
        layers: dict[str, Any] = block._modules
        found = [layers.get(name) for name in ("norm", "input_forget", "cell_output", "head_norm", "ffn_norm")]
        return tuple(layer for layer in found if layer is not None)

    def _places(self, block: nn.Module) -> tuple[Place, ...]:
        layers: dict[str, Any] = block._modules
        ffn = layers.get("ffn")
        up, down = (None, None) if ffn is None else (ffn._modules["up"], ffn._modules["down"])
        return (
            (layers["norm"]._parameters, "weight"),
            *_parameters_of(layers.get("conv")),
            (layers["input_forget"]._parameters, "weight"),
            (layers["cell_output"]._parameters, "weight"),
            (block._parameters, "gate_bias"),
            (block._parameters, "recurrent"),
            (layers["head_norm"]._parameters, "weight"),
            _parameters_of(layers.get("ffn_norm"))[0],
            *_parameters_of(up),
            *_parameters_of(down),
        )


def _drops(dropout: nn.Module | None) -> bool:
    return dropout is not None and dropout.training and getattr(dropout, "p", 0) > 0


def _are_plain(layers: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...], epsilon: float) -> bool:
    """Whether layers, norms with that epsilon among them, are still what their weights tell."""
    # a loop, as acting asks this at every step of every block
    for held, own in layers:
        if held.get("bias") is not None or own.get("eps", epsilon) != epsilon:
            return False
    return True


_NOTHING: dict[str, Tensor | None] = {"weight": None, "bias": None}


def _parameters_of(layer: nn.Module | None) -> tuple[Place, Place]:
    """Where weight and bias of a layer are held; without a layer, places that hold None."""
    # Straight in the dictionary: the attributes of modules take longer to read than a step of a block takes.
    held = _NOTHING if layer is None else layer._parameters
    return (held, "weight"), (held, "bias")


def _weights(places: tuple[Place, ...]) -> MLSTMWeights | None:
    try:
        return MLSTMWeights(*(held[name] for held, name in places))  # type: ignore[arg-type]
    # weights that pruning has put elsewhere
    except KeyError:
        return None
