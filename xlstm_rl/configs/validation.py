"""From YAML text to checked settings, and the words for what is wrong with them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Annotated, Any, TypeVar, cast, get_args

import numpy as np
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

Settings = TypeVar("Settings")

# As context of `build`: nothing is made to see whether it can be.
NOTHING_MADE = "nothing made"
# In a YAML text; a configuration has about a hundred.
MOST_VALUES = 100_000


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value, its source and the remedy."""


def _whole(value: Any) -> Any:
    """1e6 is a whole number too, and so is one of NumPy."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return int(value)
    return int(value) if isinstance(value, np.integer) else value


def _real(value: Any) -> Any:
    return float(value) if isinstance(value, (np.floating, np.integer)) else value


Flag = Annotated[bool, Field(strict=True)]
Word = Annotated[str, Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Natural = Annotated[Whole, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1)]
Real = Annotated[float, BeforeValidator(_real), Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
Weight = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]


@dataclass_transform(frozen_default=True)
def settings(cls: type[Settings]) -> type[Settings]:
    """A frozen dataclass that pydantic checks, without conversions but between whole and real numbers.

    Making one with impossible values raises ConfigError; `dataclasses.replace` and the other tools of dataclasses work.
    """
    made: Any = pydantic_dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    checked = made.__init__

    @wraps(checked)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(made, error, made.__name__)) from None

    made.__init__ = init
    return cast(type[Settings], made)


def build(cls: type[Settings], values: object, source: str, context: str | None = None) -> Settings:
    """The settings `cls` that nested mappings describe; `context` is for their own checks.

    Raises:
        ConfigError: a key is unknown or missing, or a value is impossible; the message names it and `source`.
    """
    try:
        return TypeAdapter(cls).validate_python(values, context=context)
    except ValidationError as error:
        raise ConfigError(explain(cls, error, source)) from error


def check_part(cls: type[Any], values: object, source: str) -> dict[str, Any]:
    """Refuse unknown keys and values of the wrong kind in a part of the settings `cls`; others may be missing.

    Raises:
        ConfigError: as for `build`; what depends on several values is left to it.
    """
    try:
        TypeAdapter(cls).validate_python(values, context=NOTHING_MADE)
    except ValidationError as error:
        if any(problem["type"] not in ("missing", "value_error") for problem in error.errors()):
            raise ConfigError(explain(cls, error, source)) from error
    assert isinstance(values, Mapping), "anything else is refused"
    return dict(values)


def plain(config: Any) -> Any:
    """The inverse of `build`: mappings, lists and values that YAML can hold."""
    if dataclasses.is_dataclass(config):
        as_mapping = getattr(config, "as_mapping", None)
        values = as_mapping() if as_mapping else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return plain(values)
    if isinstance(config, Mapping):
        return {key: plain(item) for key, item in config.items()}
    return [plain(item) for item in config] if isinstance(config, (tuple, list)) else config


def explain(cls: type[Any], error: ValidationError, source: str) -> str:
    """What is wrong with the first of the wrong values, and what would be right."""
    problems = error.errors()
    # a missing or dependent value says less than a wrong one
    problem = min(problems, key=lambda found: found["type"] in ("missing", "value_error"))
    path, value, context = problem["loc"], problem["input"], problem.get("ctx", {})
    name = ".".join(map(str, path))
    kind = problem["type"]
    if kind == "value_error":
        return f"{source}: {context['error']}"
    if kind == "missing":
        return f"{source} lacks {name}; give it"
    if kind == "unexpected_keyword_argument":
        return f"unknown key {name!r} in {source}; {_place(cls, path)}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return f"{name}={value!r} in {source} is not allowed; {nearest(str(value), options)}"
    if not path or kind in ("dataclass_type", "dataclass_exact_type", "mapping_type", "dict_type"):
        return f"{name or 'configuration'}={value!r} in {source} must be a mapping of keys to values"
    return f"{name}={value!r} in {source} must be {_spell(kind, context, value)}"


def _spell(kind: str, context: Mapping[str, Any], value: Any) -> str:
    bounds = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "greater than {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "less than {lt}",
    }
    if kind in bounds:
        return bounds[kind].format(**context)
    words = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a word",
        "tuple_type": "a list",
    }
    return words.get(kind, f"something else ({kind})")


def _place(cls: type[Any], path: tuple[int | str, ...]) -> str:
    """A hint at the sections that have a key, or at the most similar key of its own section."""
    key, section = str(path[-1]), cls
    for part in path[:-1]:
        # names of tasks and the like are keys of mappings, in which all values are of one kind
        section = _sections(section).get(str(part), section)
    places = [f"{name}.{key}" for name, kind in _sections(cls).items() if key in _keys(kind)] if len(path) == 1 else []
    return f"did you mean {' or '.join(map(repr, places))}?" if places else nearest(key, _keys(section))


def _sections(cls: type[Any]) -> dict[str, Any]:
    """The kinds of settings within `cls`, by the key under which one, or a mapping of them, stands."""
    fields = getattr(cls, "__pydantic_fields__", {})
    kinds = {name: [kind for kind in _parts(field.annotation) if is_settings(kind)] for name, field in fields.items()}
    return {name: found[0] for name, found in kinds.items() if found}


def is_settings(kind: Any) -> bool:
    """Whether a type is one of those that `settings` makes."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that stand in its brackets."""
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def _keys(section: Any) -> list[str]:
    known: Callable[[], list[str]] | None = getattr(section, "known_keys", None)
    return known() if known else list(getattr(section, "__pydantic_fields__", {}))


def closest(word: str, known: Iterable[str]) -> str | None:
    """A hint at the word closest to `word`; None when none is close."""
    matches = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the word closest to `word`, or at all those known when none is close."""
    words = sorted(known)
    return closest(word, words) or f"known: {', '.join(words)}"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key in (self.construct_object(part, deep=True) for part, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
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
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, source)
        return loader.construct_document(node)
    # A timestamp such as 2024-13-01 is a ValueError of its own.
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source} is no YAML that can be read: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply to be a configuration") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int | None], source: str) -> int:
    """How many values there are once all aliases are written out, each of which may stand for many others.

    Raises:
        ConfigError: too many for a configuration, or without an end.
    """
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise ConfigError(
                f"{source}: the alias {str(node.start_mark).strip()} holds itself; write out what is meant"
            )
        return known
    counts[id(node)] = None
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    flat = (part for pair in parts for part in pair) if isinstance(node, yaml.MappingNode) else parts
    total = 1 + sum(_count(part, counts, source) for part in flat)
    if total > MOST_VALUES:
        raise ConfigError(
            f"{source} holds more than {MOST_VALUES:,} values once its aliases are written out, too many for a "
            "configuration"
        )
    counts[id(node)] = total
    return total
