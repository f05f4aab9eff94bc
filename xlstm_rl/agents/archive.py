"""The files behind checkpoints: zips of JSON and safetensors, written whole or not at all, read without any code."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import gymnasium
import numpy
import safetensors.torch
import stable_baselines3
import torch
from torch import Tensor

from xlstm_rl._version import __version__
from xlstm_rl.agents.description import DescriptionError, describe, rebuild

FORMAT = "xlstm_rl checkpoint"
VERSION = 1
# Settings are kilobytes; bounds of every pixel of an observation are megabytes.
MAX_JSON_BYTES = 64 * 2**20
_MEMBER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.(json|safetensors)")


class CheckpointError(ValueError):
    """A file is no usable checkpoint; the message names the file, what is wrong and the remedy."""


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


def write_archive(target: str | os.PathLike[str] | IO[bytes], kind: str, parts: Mapping[str, Part]) -> None:
    """Write a file of parts. At a path it appears whole or not at all; missing folders are made.

    Args:
        target: path or binary file.
        kind: "model" or "policy".
        parts: by name.
    """
    libraries = {
        "xlstm_rl": __version__,
        "torch": str(torch.__version__),
        "stable_baselines3": stable_baselines3.__version__,
        "gymnasium": gymnasium.__version__,
        "numpy": numpy.__version__,
    }
    head = {"format": FORMAT, "version": VERSION, "kind": kind, "parts": sorted(parts), "libraries": libraries}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        file.writestr("format.json", json.dumps(head, indent=2))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getbuffer())


def read_archive(source: str | os.PathLike[str] | IO[bytes], kind: str) -> Archive:
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
    # RuntimeError: encrypted; NotImplementedError: an unknown way to zip
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{name} is torn or no checkpoint ({error}); use the one before, or copy it again"
        ) from error
    return Archive(name, {str(key): str(value) for key, value in head.get("libraries", {}).items()}, parts)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all: beside the path, to the disk, then in the path's place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    if head.get("version") != VERSION:
        raise CheckpointError(
            f"{name} has format version {head.get('version')!r:.50}, this library reads {VERSION}; "
            "use the version of xlstm_rl it was written with (format.json, libraries)"
        )
    if head.get("kind") != kind:
        remedy = {"model": "RecurrentPPO.load reads models", "policy": "the policy class's load reads policies"}
        raise CheckpointError(f"{name} holds a {head.get('kind')!r:.50}, not a {kind}; {remedy[kind]}")
    parts = head.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"{name}: format.json has no list of parts")
    expected = {"format.json", *(f"{part}.{suffix}" for part in parts for suffix in ("json", "safetensors"))}
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
