"""From YAML text to checked values, and from mappings to dataclasses."""

from __future__ import annotations

import dataclasses
import numbers
import re
import types
from collections.abc import Hashable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from xlstm_rl.configs.errors import ConfigError, nearest
from xlstm_rl.configs.schema import MemoryConfig, memory_settings


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: it is no YAML; the message names `source`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    # A timestamp such as 2024-13-01 is a ValueError of its own.
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source} is no YAML that can be read: {error}") from error


def check_mapping(cls: type, values: object, source: str, path: str = "") -> dict[str, Any]:
    """Check the keys and kinds of `values` against the dataclass `cls`, nested ones included.

    Args:
        cls: the dataclass.
        values: what the source gives; keys may be missing.
        source: where it comes from, for messages.
        path: dotted name of `values`.

    Returns:
        The same keys with converted values.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'configuration'}={values!r} in {source} must be a mapping of keys to values")
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if cls is MemoryConfig and key != "name":
            checked[key] = value
        elif key not in known:
            raise ConfigError(f"unknown key {name!r} in {source}; {_place(cls, str(key)) or nearest(str(key), known)}")
        elif dataclasses.is_dataclass(hints[key]):
            checked[key] = check_mapping(hints[key], value, source, name)
        else:
            checked[key] = convert(hints[key], value, name, source)
    return checked


def convert(kind: Any, value: Any, name: str, source: str) -> Any:
    """`value` as `kind`, without loss.

    Raises:
        ConfigError: it is of another kind; the message names the key, the value and the source.
    """
    for option in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        try:
            return _convert_one(option, value)
        except (TypeError, OverflowError):
            continue
    raise ConfigError(f"{name}={value!r} in {source} must be {_spell(kind)}")


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass `cls` from checked values."""
    if cls is MemoryConfig:
        settings = {key: value for key, value in values.items() if key != "name"}
        return MemoryConfig(values.get("name", MemoryConfig.name), settings)
    hints = get_type_hints(cls)
    arguments = {
        key: build(hints[key], value) if dataclasses.is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return cls(**arguments)


def flatten(config: Any) -> dict[str, Any]:
    """The inverse of `build`: plain values that YAML can hold."""
    if isinstance(config, MemoryConfig):
        return {"name": config.name, **_plain(config.settings)}
    plain: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        plain[f.name] = flatten(value) if dataclasses.is_dataclass(value) else _plain(value)
    return plain


def _place(cls: type, key: str) -> str | None:
    """A hint at the sections of `cls` that have the key; None when none has."""
    places = [
        f"{section}.{key}"
        for section, kind in get_type_hints(cls).items()
        if dataclasses.is_dataclass(kind) and key in _keys(kind)
    ]
    return f"did you mean {' or '.join(map(repr, places))}?" if places else None


def _keys(section: Any) -> list[str]:
    if section is MemoryConfig:
        return ["name", *memory_settings(MemoryConfig.name)]
    return [f.name for f in dataclasses.fields(section)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _convert_one(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        # Whether the word is allowed is checked, with a hint, by the dataclass.
        return _convert_one(str, value)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert_one(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is Mapping and isinstance(value, Mapping):
        return dict(value)
    if kind is type(None) and value is None:
        return None
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float and isinstance(value, numbers.Real):
        return float(value)
    elif kind is int and isinstance(value, numbers.Real) and float(value).is_integer():
        return int(float(value)) if not isinstance(value, numbers.Integral) else int(value)
    elif kind is str and isinstance(value, str):
        return value
    raise TypeError


def _spell(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return "a list of words" if str in get_args(kind) else "a list of whole numbers"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        type(None): "null (left out)",
    }
    return words.get(kind, "a word" if get_origin(kind) is Literal else "a mapping of keys to values")
