"""The memory core: everything between a sequence of features and a sequence of features that remembers."""

from __future__ import annotations

import contextlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_rl.kernels.argument_checks import check_reset
from xlstm_rl.kernels.tracing import traced
from xlstm_rl.memory.state import leaves

# What operations on states of another structure raise.
MISFITS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class MemoryCore(nn.Module, ABC):
    """Base class of memories; a subclass implements `initial_state` and `forward` and obeys the laws.

    The laws, checked by `xlstm_rl.memory.laws.check_memory_laws`:
    carry (a sequence equals its steps), split (two sequences with the carried state equal their concatenation),
    reset (from an episode start on, everything equals a fresh state and no gradient crosses it),
    rows (a row does not depend on the other rows), spoilt (an input that is not finite reaches no step before it and
    no later episode), zeros (the all-zero state is the empty one).

    A state is a tree of NamedTuples of tensors, every leaf batch first. It is passed in and returned; the module
    itself remembers nothing between calls.

    Attributes:
        input_size: features per step of the input.
        output_size: features per step of the output.
    """

    input_size: int
    output_size: int

    def __call__(self, x: Tensor, state: Any = None, reset: Tensor | None = None) -> Any:
        """Run a sequence, see `forward`; without a state, from the empty one.

        Raises:
            ValueError: `x` or the state does not fit this core; the message says how.
        """
        state = self._checked_state(x, state, reset, 3)
        try:
            return super().__call__(x, state, reset)
        except MISFITS:
            self._check_fits(state, x)
            raise

    def _checked_state(self, x: Tensor, state: Any, reset: Tensor | None, dimensions: int) -> Any:
        """The state, or the empty one for None, where all arguments fit: `x` of 3 dimensions, or of 2 for a step."""
        if traced():
            return self.initial_state(x.shape[0]) if state is None else state
        if x.ndim != dimensions or x.shape[-1] != self.input_size:
            sequence, step = f"[B, T, {self.input_size}]", f"[B, {self.input_size}]"
            wanted = (
                f"a sequence {sequence}; core.step takes {step}"
                if dimensions == 3
                else f"a step {step}; core(x, state) takes {sequence}"
            )
            raise ValueError(f"x has shape {list(x.shape)}, and wanted is {wanted} (input_size={self.input_size})")
        if reset is not None:
            check_reset(reset, *x.shape[:-1])
        if state is None:
            return self.initial_state(x.shape[0])
        if any(leaf.shape[:1] != x.shape[:1] for leaf in leaves(state)):
            self._check_fits(state, x)
        return state

    def _check_fits(self, state: Any, x: Tensor) -> None:
        """Refuse a state that is not one of this core for the rows of `x`."""
        empty = self.initial_state(x.shape[0])
        expected, found = ([list(leaf.shape) for leaf in leaves(tree)] for tree in (empty, state))
        if found != expected or type(state) is not type(empty):
            raise ValueError(
                f"the state is a {type(state).__name__} of tensors of the shapes {found}, and that of {x.shape[0]} "
                f"rows of this core is a {type(empty).__name__} of {expected}: hand over what this core returned for "
                "the same rows, unpack(flat, like=core.initial_state(1)) of what pack made of it, or None for the "
                "empty one"
            )

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """Return the empty state of `batch_size` rows: zeros, in the dtype and on the device of the parameters."""

    @abstractmethod
    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run a sequence.

        Args:
            x: [B, T, input_size].
            state: as returned by `initial_state(B)` or by an earlier call.
            reset: bool [B, T] or None; true where the observation is the first of an episode. The row's state is
                emptied before that step.

        Returns:
            Output [B, T, output_size] and the state after the last step.
        """

    def step(
        self, x: Tensor, state: Any = None, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Run one step.

        Args:
            x: [B, input_size].
            state: before the step; None for the empty one.
            reset: bool [B] or None, true where `x` is the first of an episode.
            reuse_state: permission to write the new state over `state`, for callers that only use the new one, and
                through which no gradient is to flow any more; it makes memories with a large state faster.

        Returns:
            Output [B, output_size] and the state after the step.

        Raises:
            ValueError: `x` or the state does not fit this core; the message says how.
        """
        state = self._checked_state(x, state, reset, 2)
        y, state = self(x.unsqueeze(1), state, None if reset is None else reset.unsqueeze(1))
        return y.squeeze(1), state

    @property
    def state_size(self) -> int:
        """Numbers in the state of one row."""
        return sum(leaf.numel() for leaf in leaves(self.initial_state(1)))

    def _zeros(self, *shape: int) -> Tensor:
        like = next(self.parameters(), None)
        return torch.zeros(shape) if like is None else like.new_zeros(shape)


class MemoryBlock(nn.Module, ABC):
    """Base class of the blocks that a stack is made of; a subclass implements `initial_state` and `forward`.

    A stack of blocks that obey the laws of `MemoryCore` obeys them too. Input and output have the same width, and a
    block carries its state as a core does.
    """

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """Return the empty state of `batch_size` rows: zeros, in the dtype and on the device of the parameters."""

    @abstractmethod
    def forward(self, x: Tensor, state: Any, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run a sequence: x [B, T, width], reset bool [B, T] or None -> y [B, T, width] and the state."""

    def step(
        self, x: Tensor, state: Any, reset: Tensor | None = None, *, reuse_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Run one step, x [B, width], reset bool [B] or None; see `MemoryCore.step`."""
        y, state = self(x.unsqueeze(1), state, None if reset is None else reset.unsqueeze(1))
        return y.squeeze(1), state


# Sizes that the usual numbers of heads divide.
UNIT = 8

MemoryFactory = Callable[..., MemoryCore]
BlockFactory = Callable[..., MemoryBlock]
_REGISTRY: dict[str, MemoryFactory] = {}
_BLOCKS: dict[str, BlockFactory] = {}


def register_memory(name: str, factory: MemoryFactory) -> None:
    """Make a memory available to `make_memory` and to policies under `name`.

    Args:
        name: the new name; letters, digits, '-' and '_'.
        factory: called as `factory(input_size, **config)`; a `MemoryCore` subclass will do.

    Raises:
        TypeError: the factory cannot be called.
        ValueError: the name is taken by another factory, or is no plain name. The same definition run again, as in a
            notebook, takes the place of the one before.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"memory name {name!r} must be made of letters, digits, '-' and '_'")
    if not callable(factory):
        raise TypeError(
            f"factory={factory!r} must be callable: a MemoryCore subclass, or a function that returns a core"
        )
    if _origin(_REGISTRY.get(name, factory)) != _origin(factory):
        raise ValueError(f"memory {name!r} is already registered; choose another name")
    _REGISTRY[name] = factory


def register_block(letter: str, factory: BlockFactory) -> None:
    """Add a letter to the stacks of the memory "xlstm", so that `blocks="max"` has yours on top of two others.

    Args:
        letter: one small letter.
        factory: called as `factory(config, index)` with the `XLSTMConfig` of the stack and the place in it, counted
            from 0; a `MemoryBlock` subclass will do.

    Raises:
        TypeError: the factory cannot be called.
        ValueError: the letter is taken by another factory, or is no small letter. The same definition run again, as in
            a notebook, takes the place of the one before.
    """
    if len(letter) != 1 or not "a" <= letter <= "z":
        raise ValueError(f"letter={letter!r} must be one small letter, from 'a' to 'z'")
    if not callable(factory):
        raise TypeError(
            f"factory={factory!r} must be callable: a MemoryBlock subclass, or a function that returns a block"
        )
    if _origin(_BLOCKS.get(letter, factory)) != _origin(factory):
        raise ValueError(f"letter {letter!r} is already registered; choose another one than {sorted(_BLOCKS)}")
    _BLOCKS[letter] = factory


def block_letters() -> tuple[str, ...]:
    """All letters that a stack can be spelt with."""
    return tuple(_BLOCKS)


def make_block(letter: str, config: Any, index: int) -> MemoryBlock:
    """The block of a letter, for place `index` in a stack."""
    return _BLOCKS[letter](config, index)


def _origin(factory: MemoryFactory | BlockFactory) -> tuple[Any, Any]:
    """What stays the same when a cell of a notebook is run again."""
    return getattr(factory, "__module__", factory), getattr(factory, "__qualname__", factory)


def memory_names() -> list[str]:
    """Names that `make_memory` knows, sorted."""
    return sorted(_REGISTRY)


def make_memory(name: str, input_size: int, *, match_parameters: int | None = None, **config: Any) -> MemoryCore:
    """Build a memory core by name.

    Args:
        name: "xlstm", "lstm", "gru", "transformer", "ssm", "rwkv", "frames", "none" or a registered name.
        input_size: features per step.
        match_parameters: choose the `hidden_size` whose number of parameters comes closest to this, to compare
            memories of equal size.
        **config: passed on, for example `hidden_size=64, blocks="ms"` for "xlstm" (see `XLSTMConfig`).

    Raises:
        TypeError: a setting is unknown, missing or of another type.
        ValueError: the name is unknown, or a setting does not fit.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown memory {name!r}; known are {memory_names()}; add yours with register_memory")
    factory = _REGISTRY[name]
    # NumPy's integers, which Stable-Baselines3 makes of MultiDiscrete spaces, are none to torch
    input_size = int(input_size)
    if match_parameters is not None and "hidden_size" in config:
        size = config["hidden_size"]
        raise ValueError(f"match_parameters={match_parameters} chooses hidden_size: leave out hidden_size={size}")
    _check_names(name, config if match_parameters is None else {**config, "hidden_size": None})
    if match_parameters is not None:
        heads = [value for key, value in config.items() if key.endswith("num_heads") and isinstance(value, int)]
        # heads of one unit are no memories
        unit = math.lcm(UNIT, *(2 * value for value in heads if value > 0))
        config["hidden_size"] = _matching_size(
            lambda size: factory(input_size, hidden_size=size, **config), match_parameters, unit
        )
    return factory(input_size, **config)


def memory_defaults(name: str) -> dict[str, Any]:
    """Settings of a memory by name that have a default of their own, with it; those of "xlstm" are in `XLSTMConfig`."""
    arguments = inspect.signature(_REGISTRY[name]).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}


def _check_names(name: str, config: dict[str, Any]) -> None:
    signature = inspect.signature(_REGISTRY[name])
    try:
        signature.bind(0, **config)
    except TypeError as error:
        settings = [part.name for part in list(signature.parameters.values())[1:] if part.kind is not part.VAR_KEYWORD]
        raise TypeError(f"memory {name!r} {error}; its settings are {settings}") from error


def _matching_size(build: Callable[[int], MemoryCore], target: int, unit: int) -> int:
    """The hidden size whose number of parameters is closest to the target; multiples of `unit` are always possible."""

    def distance(size: int) -> int:
        # no memory is filled for parameters on "meta"
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build(size).parameters()) - target

    if distance(unit) > 0:
        raise ValueError(f"match_parameters={target} is less than the smallest memory of its kind has")
    if distance(2 * unit) == distance(unit):
        raise ValueError(
            f"match_parameters={target} cannot be met: the parameters of this memory do not grow with hidden_size"
        )
    low, high = unit, 2 * unit
    while distance(high) < 0:
        low, high = high, 2 * high
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if distance(middle) <= 0 else (low, middle)
    candidates = {}
    for size in range(low, high + 1):
        with contextlib.suppress(ValueError):  # heads do not divide it
            candidates[size] = abs(distance(size))
    return min(candidates, key=lambda size: candidates[size])
