"""Checkpoint files: zips of JSON and safetensors, written whole or not at all, read without running any code."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import secrets
import socket
import zipfile
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple, TypeAlias

import gymnasium
import numpy as np
import safetensors.torch
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor

from xlstm_rl._version import __version__
from xlstm_rl.agents.features import FlatSmallImagesExtractor
from xlstm_rl.agents.losses import AdvantageScale, LateSchedule
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer

File: TypeAlias = str | os.PathLike[str] | IO[bytes]

FORMAT = "xlstm_rl checkpoint"
# 2 has the member "data" and names the weights of an optimiser's groups; since 3 "xlstm" is the recommended memory.
VERSION = 3
READABLE = (1, 2, 3)
# Settings are kilobytes; bounds of every pixel of an observation are megabytes.
MAX_JSON_BYTES = 64 * 2**20
# Elements of one bound of a space: more than any observation that fits a network, less than memory.
MAX_ELEMENTS = 2**26
# What a JSON object stands for; an object without it is a dict.
KIND = "$kind"
# The member in which tools for agents of Stable-Baselines3 look for settings.
FOREIGN = "data"
_MEMBER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.(json|safetensors)|data")
_UNFINISHED = ".part"
_HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())[:60]
_WRITER = re.compile(r"\.(?P<host>[A-Za-z0-9-]*)@(?P<process>\d+)\.[0-9a-f]+\.part$")
_READERS = {"model": "xlstm_rl.RecurrentPPO.load(path)", "policy": "xlstm_rl.XLSTMPolicy.load(path)"}


class CheckpointError(ValueError):
    """A file is no usable checkpoint; the message names the file, what is wrong and the remedy."""


class DescriptionError(ValueError):
    """A value has no description, or a description has no value; `where` says which."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where} {reason}")
        self.where = where


class NotStoredError(DescriptionError):
    """The description says that the value was left out."""


class Part(NamedTuple):
    """One thing in a file: described values and the tensors they name."""

    tree: Any
    tensors: dict[str, Tensor]


class Archive(NamedTuple):
    """What a file holds."""

    name: str
    """Of the file, for errors."""
    libraries: dict[str, str]
    """Versions it was written with."""
    parts: dict[str, Part]
    version: int = VERSION
    """Of the format."""

    def value(self, part: str) -> Any:
        """The values of a part.

        Raises:
            CheckpointError: the part is missing or damaged.
        """
        if part not in self.parts:
            raise CheckpointError(f"{self.name} holds no {part}.json; it is incomplete")
        try:
            return rebuild(self.parts[part].tree, "", self.parts[part].tensors)
        except (DescriptionError, RecursionError) as error:
            raise CheckpointError(f"{self.name}, {part}.json: {error}") from error


def describe_part(value: Any, *, leave_out: bool = False) -> Part:
    """Describe a value as a part of a file."""
    tensors: dict[str, Tensor] = {}
    return Part(describe(value, "", tensors, leave_out=leave_out), tensors)


def write_archive(target: File, kind: str, parts: Mapping[str, Part]) -> None:
    """Write a file of parts. At a path it appears whole or not at all; missing folders are made.

    Args:
        target: path or binary file.
        kind: "model" or "policy".
        parts: by name; "data" holds the settings.
    """
    libraries = {
        "xlstm_rl": __version__,
        "torch": str(torch.__version__),
        "stable_baselines3": stable_baselines3.__version__,
        "gymnasium": gymnasium.__version__,
        "numpy": np.__version__,
    }
    head = {"format": FORMAT, "version": VERSION, "kind": kind, "parts": sorted(parts), "libraries": libraries}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr("format.json", json.dumps(head, indent=2))
        file.writestr(FOREIGN, json.dumps(_for_others(head, parts["data"].tree), indent=1))
        for name, (tree, tensors) in parts.items():
            file.writestr(f"{name}.json", json.dumps(tree, indent=1, allow_nan=False))
            # safetensors refuses tensors that share memory or have gaps
            packed = {
                key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in tensors.items()
            }
            file.writestr(f"{name}.safetensors", safetensors.torch.save(packed))
    if not isinstance(target, str | os.PathLike):
        target.write(content.getbuffer())
        return
    path = Path(target)
    make_folder(path.parent)
    write_whole(path, content.getbuffer())


def _for_others(head: dict[str, Any], settings: Any) -> dict[str, Any]:
    """Settings for tools that know files of Stable-Baselines3, such as its hub, and what this file is.

    Loaders of Stable-Baselines3 warn of an entry that they cannot unpickle by its name, which here says how to load
    the file. Spaces are left out, for theirs would be pickles.
    """
    reader = _READERS[head["kind"]]
    plain = {key: value for key, value in settings.items() if not key.endswith("_space") and not key.startswith("_")}
    told = {"format": FORMAT, "version": VERSION, "kind": head["kind"], "load_with": reader}
    warned = {f"this file, which is read by {reader}": {":serialized:": None}}
    return told | {"libraries": head["libraries"]} | warned | plain


def read_archive(source: File, kind: str) -> Archive:
    """Read a file of parts; nothing in it is executed or written to disk.

    Args:
        source: path or binary file.
        kind: "model" or "policy".

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is torn, foreign, of another version or kind, or tries something.
    """
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return read_archive(file, kind)
    name = str(getattr(source, "name", "the file"))
    try:
        with zipfile.ZipFile(source) as file:
            _check_members(file, name, source.seek(0, os.SEEK_END))
            head = _read_json(file, "format.json", name)
            _check_head(head, kind, file.namelist(), name)
            parts = {part: _read_part(file, part, name) for part in head["parts"]}
    # RuntimeError: encrypted; NotImplementedError: an unknown way to zip; the others: places outside the file
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(
            f"{name} is torn or no checkpoint ({error}); use the one before, or copy it again"
        ) from error
    libraries = {str(key): str(value) for key, value in head["libraries"].items()}
    return Archive(name, libraries, parts, head["version"])


def _check_members(file: zipfile.ZipFile, name: str, size: int) -> None:
    names = file.namelist()
    if any(member.endswith(".pkl") for member in names):
        raise CheckpointError(f"{name} is a file of torch.save: loading it could run code from it, so it is not loaded")
    if "_stable_baselines3_version" in names or {"data", "policy.pth"} <= set(names):
        raise CheckpointError(
            f"{name} is a zip of Stable-Baselines3 (cloudpickle): loading it would run code from it, so it is not "
            "loaded. If you trust whoever made it: RecurrentPPO.load(path, allow_pickle=True)"
        )
    for member in file.infolist():
        if not _MEMBER.fullmatch(member.filename):
            raise CheckpointError(f"{name} holds {member.filename!r:.200}, which belongs to no checkpoint; not loaded")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(f"{name} holds {member.filename!r} compressed; checkpoints are not; not loaded")
        if member.filename.endswith(".json") and member.file_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{name}: {member.filename} has {member.file_size} bytes, allowed are {MAX_JSON_BYTES}; not loaded"
            )
    total = sum(member.file_size for member in file.infolist())
    if len(set(names)) != len(names) or total > size:
        raise CheckpointError(f"{name} holds members twice, or {total} bytes in {size}; not loaded")
    if "format.json" not in names:
        raise CheckpointError(f"{name} is a zip without format.json: no checkpoint of xlstm_rl, or an incomplete one")


def _check_head(head: Any, kind: str, members: list[str], name: str) -> None:
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise CheckpointError(f"{name} is no checkpoint of xlstm_rl: its format.json names no {FORMAT!r}")
    if head.get("version") not in READABLE:
        raise CheckpointError(
            f"{name} has format version {head.get('version')!r:.50}, this library reads {', '.join(map(str, READABLE))}"
            "; use the version of xlstm_rl it was written with (format.json, libraries)"
        )
    if head.get("kind") != kind:
        remedy = {"model": "RecurrentPPO.load reads models", "policy": "the policy class's load reads policies"}
        raise CheckpointError(f"{name} holds a {head.get('kind')!r:.50}, not a {kind}; {remedy[kind]}")
    parts = head.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"{name}: format.json has no list of parts")
    expected = {"format.json", *(f"{part}.{suffix}" for part in parts for suffix in ("json", "safetensors"))}
    if head["version"] > 1:
        expected.add(FOREIGN)
    if expected != set(members):
        raise CheckpointError(
            f"{name} is incomplete or changed: missing {sorted(expected - set(members))}, "
            f"unknown {sorted(set(members) - expected)}"
        )
    if not isinstance(head.get("libraries"), dict):
        raise CheckpointError(f"{name}: format.json names no libraries")


def _read_json(file: zipfile.ZipFile, member: str, name: str) -> Any:
    try:
        return json.loads(file.read(member))
    # a UnicodeDecodeError and a number of too many digits are ValueErrors as well
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {member} is no JSON ({error})") from error


def _read_part(file: zipfile.ZipFile, part: str, name: str) -> Part:
    tree = _read_json(file, f"{part}.json", name)
    try:
        tensors = safetensors.torch.load(file.read(f"{part}.safetensors"))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{name}: {part}.safetensors is damaged ({error})") from error
    return Part(tree, tensors)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all, and is on the disk when this returns.

    It is written beside the path under a name that tells the process, flushed to the disk and put in the path's place;
    then the folder is flushed, for it holds the name.
    """
    temporary = path.with_name(f".{path.name[:100]}.{_HOST}@{os.getpid()}.{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, on the disk when this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def flush_file(path: Path) -> None:
    """Put what was written to a file on the disk; one that is not there has nothing."""
    try:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except FileNotFoundError:
        return


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:
        # a folder that may be written to and not be read
        return
    try:
        os.fsync(number)
    except OSError as error:
        # some network file systems have nothing to flush in a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(number)


def remove_unfinished(folder: Path, names: Collection[str] = ()) -> None:
    """Remove what processes that are no more left of files that `write_whole` had begun.

    Args:
        folder: where.
        names: files, as patterns, that no other process can be writing; what was begun of them is removed whoever
            began it, on another machine too.
    """
    for path in folder.glob(f".*{_UNFINISHED}"):
        told = _WRITER.search(path.name)
        host, process = (told["host"], int(told["process"])) if told else (_HOST, 0)
        alone = any(fnmatch(path.name, f".{name}.*{_UNFINISHED}") for name in names)
        if alone or (host == _HOST and not _is_alive(process)):
            # a folder may be there to be read only
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Whether a process of this machine may be running; unknown ones, 0, are not."""
    if process in (0, os.getpid()) or os.name == "nt":
        # Windows does not let go of a file that somebody has open, and knows no harmless signal
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _named(module: Any, names: list[str]) -> dict[str, type]:
    classes = {name: getattr(module, name) for name in names}
    return {f"{module.__name__}.{name}": kind for name, kind in classes.items() if isinstance(kind, type)}


_CLASSES: dict[str, type] = {
    **_named(torch.nn, [*torch.nn.modules.activation.__all__, "Identity"]),
    **_named(torch.optim, [name for name in dir(torch.optim) if name[0].isupper()]),
    **{
        f"{kind.__module__.split('.')[0]}.{kind.__name__}": kind
        for kind in (
            FlattenExtractor,
            NatureCNN,
            CombinedExtractor,
            FlatSmallImagesExtractor,
            RMSpropTFLike,
            ChunkedRolloutBuffer,
        )
    },
}
_CLASS_NAMES = {kind: name for name, kind in _CLASSES.items()}


def class_by_word(word: str, module: str) -> type:
    """A class that files may name by its own name, in letters of any case: "relu" of "torch.nn".

    Raises:
        ValueError: there is none of that name.
    """
    known = {name.rpartition(".")[2]: kind for name, kind in _CLASSES.items() if name.rpartition(".")[0] == module}
    for name, kind in known.items():
        if name.lower() == word.lower():
            return kind
    raise ValueError(f"{word!r} is no class of {module} that is known here; known are {', '.join(sorted(known))}")


# Objects made of their constructor's arguments.
_OBJECTS: dict[type, tuple[str, ...]] = {
    ConstantSchedule: ("val",),
    LinearSchedule: ("start", "end", "end_fraction"),
    FloatSchedule: ("value_schedule",),
    LateSchedule: ("value", "part"),
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
    name = class_name(value if isinstance(value, type) else type(value))
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


def class_name(kind: type) -> str:
    """How files name a class: that of the allow-list, or module and name."""
    return _CLASS_NAMES.get(kind, f"{kind.__module__}.{kind.__qualname__}")


def named_class(name: Any) -> type | None:
    """The class of the allow-list with that name; None if there is none."""
    return _CLASSES.get(name) if isinstance(name, str) else None


def _finite_or_name(number: float) -> float | str:
    """JSON has no infinities."""
    return number if math.isfinite(number) else str(number)


def _describe_space(space: spaces.Space[Any], where: str) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound(space.low), "high": _bound(space.high)}
        return {KIND: "Box", "dtype": np.dtype(space.dtype).name, "shape": list(space.shape), **bounds}
    if isinstance(space, spaces.Discrete):
        dtype = np.dtype(space.dtype)
        # before 1.3 gymnasium knows one dtype alone
        other = {} if dtype == np.int64 else {"dtype": dtype.name}
        return {KIND: "Discrete", "n": int(space.n), "start": int(space.start), **other}
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


def _rebuild_discrete(tree: dict[str, Any], where: str, tensors: Mapping[str, Tensor]) -> spaces.Discrete:
    other: dict[str, Any] = {"dtype": np.dtype(tree["dtype"]).type} if "dtype" in tree else {}
    return spaces.Discrete(tree["n"], start=tree["start"], **other)


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
    "Discrete": _rebuild_discrete,
    "MultiDiscrete": _rebuild_multi_discrete,
    "MultiBinary": lambda tree, where, tensors: spaces.MultiBinary(tree["n"]),
    "Dict": _rebuild_dict_space,
}
