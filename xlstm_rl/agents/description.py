"""Settings as JSON and back: plain values, tensors by name, spaces, schedules and classes of an allow-list."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor

from xlstm_rl.agents.losses import AdvantageScale
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer

# What a JSON object stands for; an object without it is a dict.
KIND = "$kind"
# Elements of one bound of a space: more than any observation that fits a network, less than memory.
MAX_ELEMENTS = 2**26


class DescriptionError(ValueError):
    """A value has no description, or a description has no value; `where` says which."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where} {reason}")
        self.where = where


class NotStoredError(DescriptionError):
    """The description says that the value was left out."""


def _named(module: Any, names: list[str]) -> dict[str, type]:
    classes = {name: getattr(module, name) for name in names}
    return {f"{module.__name__}.{name}": kind for name, kind in classes.items() if isinstance(kind, type)}


_CLASSES: dict[str, type] = {
    **_named(torch.nn, [*torch.nn.modules.activation.__all__, "Identity"]),
    **_named(torch.optim, [name for name in dir(torch.optim) if name[0].isupper()]),
    **{
        f"{kind.__module__.split('.')[0]}.{kind.__name__}": kind
        for kind in (FlattenExtractor, NatureCNN, CombinedExtractor, RMSpropTFLike, ChunkedRolloutBuffer)
    },
}
_CLASS_NAMES = {kind: name for name, kind in _CLASSES.items()}
# Objects made of their constructor's arguments.
_OBJECTS: dict[type, tuple[str, ...]] = {
    ConstantSchedule: ("val",),
    LinearSchedule: ("start", "end", "end_fraction"),
    FloatSchedule: ("value_schedule",),
}


def describe(value: Any, where: str, tensors: dict[str, Tensor], *, leave_out: bool = False) -> Any:
    """Turn a value into what `json.dumps` takes; `rebuild` is the inverse.

    Args:
        value: None, bool, int, float, str, path (kept as str), NumPy number (kept as Python number), list, tuple,
            deque, dict, array, tensor, space, one of SB3's schedules, `AdvantageScale`, or a class of the allow-list.
        where: its name, for errors and for the names of tensors.
        tensors: arrays and tensors are put here by name, one entry for tensors that share their memory.
        leave_out: note that and what was left out where a value has no description, in place of raising.

    Raises:
        DescriptionError: a value has no description.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {KIND: "float", "value": str(value)}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Tensor):
        return {KIND: "tensor", "name": _put(value, where, tensors)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {KIND: "array", "name": _put(torch.from_numpy(value.copy(order="C")), where, tensors)}
    if isinstance(value, spaces.Space):
        return _describe_space(value, where)
    if isinstance(value, type) and value in _CLASS_NAMES:
        return {KIND: "class", "name": _CLASS_NAMES[value]}
    if type(value) is AdvantageScale:
        return {KIND: "AdvantageScale", "mean_square": _finite_or_name(value.mean_square), "count": value.count}

    def inner(part: Any, name: Any) -> Any:
        return describe(part, f"{where}.{name}" if where else str(name), tensors, leave_out=leave_out)

    if type(value) in _OBJECTS:
        fields = _OBJECTS[type(value)]
        return {KIND: type(value).__name__, **{name: inner(getattr(value, name), name) for name in fields}}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and KIND not in value:
            return {key: inner(part, key) for key, part in value.items()}
        pairs = [[inner(key, "key"), inner(part, key)] for key, part in value.items()]
        return {KIND: "dict", "items": pairs}
    if type(value) in (list, tuple, deque):
        items = [inner(part, index) for index, part in enumerate(value)]
        if isinstance(value, deque):
            return {KIND: "deque", "maxlen": value.maxlen, "items": items}
        return items if isinstance(value, list) else {KIND: "tuple", "items": items}
    name = _full_name(value if isinstance(value, type) else type(value))
    if leave_out:
        return {KIND: "left out", "was": name if isinstance(value, type) else f"an instance of {name}"}
    raise DescriptionError(where, f"is {value!r:.200} ({name}), which has no description as data")


def rebuild(tree: Any, where: str, tensors: Mapping[str, Tensor]) -> Any:
    """Make the value that `describe` turned into `tree`.

    Args:
        tree: as `json.loads` gives it.
        where: its name, for errors.
        tensors: what the names of tensors stand for.

    Raises:
        NotStoredError: a value was left out.
        DescriptionError: this describes nothing.
    """
    if isinstance(tree, list):
        return [rebuild(part, f"{where}.{index}", tensors) for index, part in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if KIND not in tree:
        return {key: rebuild(part, f"{where}.{key}" if where else key, tensors) for key, part in tree.items()}
    if tree[KIND] == "left out":
        raise NotStoredError(where, f"was {tree.get('was')}")
    if not isinstance(tree[KIND], str) or tree[KIND] not in _REBUILD:
        raise DescriptionError(where, f"is of unknown kind {tree[KIND]!r:.200}")
    try:
        return _REBUILD[tree[KIND]](tree, where, tensors)
    except (DescriptionError, RecursionError):
        raise
    # gymnasium checks the arguments of spaces by assert
    except (AssertionError, AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DescriptionError(where, f"describes no {tree[KIND]}: {type(error).__name__}: {error}") from error


def _put(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    """Add a tensor and return its name, that of an equal view of the same memory if there is one."""
    tensor = tensor.detach()
    if tensor.numel():
        for known, other in tensors.items():
            if tensor.data_ptr() == other.data_ptr() and tensor.dtype == other.dtype and tensor.shape == other.shape:
                if tensor.stride() == other.stride():
                    return known
    tensors[name] = tensor
    return name


def _full_name(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _finite_or_name(number: float) -> float | str:
    """JSON has no infinities."""
    return number if math.isfinite(number) else str(number)


def _describe_space(space: spaces.Space[Any], where: str) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound(space.low), "high": _bound(space.high)}
        return {KIND: "Box", "dtype": np.dtype(space.dtype).name, "shape": list(space.shape), **bounds}
    if isinstance(space, spaces.Discrete):
        return {KIND: "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        dtype = np.dtype(space.dtype).name
        return {KIND: "MultiDiscrete", "dtype": dtype, "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {KIND: "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(size) for size in space.n]}
    if isinstance(space, spaces.Dict):
        parts = [[key, _describe_space(part, f"{where}.{key}")] for key, part in space.spaces.items()]
        return {KIND: "Dict", "spaces": parts}
    raise DescriptionError(where, f"is a space {space!r:.200}, which Stable-Baselines3 does not support")


def _bound(bound: np.ndarray) -> Any:
    """One number if all elements are equal, else all, nested."""

    def name_infinities(part: Any) -> Any:
        if isinstance(part, list):
            return [name_infinities(inner) for inner in part]
        return _finite_or_name(part)

    same = bound.size > 0 and bool((bound == bound.flat[0]).all())
    return name_infinities(bound.flat[0].item() if same else bound.tolist())


def _rebuild_box(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> spaces.Box:
    dtype = np.dtype(tree["dtype"])
    shape = tuple(tree["shape"])
    if dtype.kind not in "biuf" or math.prod(shape) > MAX_ELEMENTS or not all(type(size) is int for size in shape):
        raise ValueError(f"{dtype} {shape!r:.200} is no numeric array of at most {MAX_ELEMENTS} elements")
    # asarray reads "inf" as a float
    low, high = (np.broadcast_to(np.asarray(tree[name], dtype), shape).copy() for name in ("low", "high"))
    return spaces.Box(low, high, shape, dtype.type)


def _rebuild_multi_discrete(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> spaces.MultiDiscrete:
    dtype: Any = np.dtype(tree["dtype"]).type
    return spaces.MultiDiscrete(np.array(tree["nvec"], dtype), dtype=dtype, start=np.array(tree["start"], dtype))


def _rebuild_dict_space(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> spaces.Dict:
    parts = [(key, rebuild(part, f"{where}.{key}", tensors)) for key, part in tree["spaces"]]
    # gymnasium sorts the keys of a dict; those of the file are in the order of the networks' inputs
    return spaces.Dict(parts)


def _rebuild_tensor(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if tree["name"] not in tensors:
        raise DescriptionError(where, f"is tensor {tree['name']!r:.200}, which is missing")
    return tensors[tree["name"]]


def _rebuild_class(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> type:
    if tree["name"] not in _CLASSES:
        raise DescriptionError(where, f"is class {tree['name']!r:.200}, which is not among those a file may name")
    return _CLASSES[tree["name"]]


def _rebuild_dict(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    pairs = ((rebuild(key, where, tensors), part) for key, part in tree["items"])
    return {key: rebuild(part, f"{where}.{key}", tensors) for key, part in pairs}


def _rebuild_advantage_scale(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> AdvantageScale:
    scale = AdvantageScale()
    scale.mean_square, scale.count = float(tree["mean_square"]), int(tree["count"])
    return scale


def _rebuild_object(kind: type) -> Callable[[dict[str, Any], str, Mapping[str, Tensor]], Any]:
    def make(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> Any:
        arguments = {name: rebuild(tree[name], f"{where}.{name}", tensors) for name in _OBJECTS[kind]}
        allowed = (int, float, *_OBJECTS)
        if not all(isinstance(argument, allowed) for argument in arguments.values()):
            raise TypeError(f"{arguments!r:.200} are no numbers or schedules")
        return kind(**arguments)

    return make


_REBUILD: dict[str, Callable[[dict[str, Any], str, Mapping[str, Tensor]], Any]] = {
    "float": lambda tree, where, tensors: float(tree["value"]),
    "tensor": _rebuild_tensor,
    "array": lambda tree, where, tensors: _rebuild_tensor(tree, where, tensors).numpy(),
    "class": _rebuild_class,
    "dict": _rebuild_dict,
    "tuple": lambda tree, where, tensors: tuple(rebuild(tree["items"], where, tensors)),
    "deque": lambda tree, where, tensors: deque(rebuild(tree["items"], where, tensors), tree["maxlen"]),
    "AdvantageScale": _rebuild_advantage_scale,
    **{kind.__name__: _rebuild_object(kind) for kind in _OBJECTS},
    "Box": _rebuild_box,
    "Discrete": lambda tree, where, tensors: spaces.Discrete(tree["n"], start=tree["start"]),
    "MultiDiscrete": _rebuild_multi_discrete,
    "MultiBinary": lambda tree, where, tensors: spaces.MultiBinary(tree["n"]),
    "Dict": _rebuild_dict_space,
}
