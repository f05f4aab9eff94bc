"""The one loader: a preset, a YAML file or an environment id, plus overrides, to a `TrainConfig`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium
import yaml

from xlstm_rl.configs.conversion import build, check_mapping, flatten, parse_yaml
from xlstm_rl.configs.errors import ConfigError, nearest
from xlstm_rl.configs.schema import TrainConfig


def preset_names() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def load(name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """The configuration of `name`, changed by overrides.

    Args:
        name: a preset, a path ending in ".yaml", or any gymnasium id (then with the defaults).
        overrides: "a.b=value" each, the value spelled as in YAML; later ones win. Changing `memory.name` drops the
            settings of the memory that was there, `hidden_size` excepted, because another memory has others.

    Raises:
        ConfigError: the name or a key is unknown, or a value is impossible; the message names it, where it stands and
            the remedy.
    """
    if name in preset_names():
        source = f"preset {name}.yaml"
        values = _check(parse_yaml((_presets() / f"{name}.yaml").read_text(encoding="utf-8"), source), source)
    elif name.endswith((".yaml", ".yml")):
        values = _read(Path(name))
    else:
        _check_registered(name, "neither a preset nor a registered environment", preset_names())
        values = {"env": {"id": name}}
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return _build(values, name)


def load_file(path: Path) -> TrainConfig:
    """The configuration in a YAML file, such as the config.yaml of a run folder."""
    return _build(_read(path), str(path))


def dump(config: TrainConfig) -> str:
    """The whole configuration as YAML, defaults included; `load_file` reads it back equal."""
    return yaml.safe_dump(flatten(config), sort_keys=False, width=120)


def _presets() -> Any:
    return resources.files("xlstm_rl.configs") / "presets"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return _check(parse_yaml(text, str(path)), str(path))


def _check(values: object, source: str) -> dict[str, Any]:
    return check_mapping(TrainConfig, {} if values is None else values, source)


def _check_registered(env_id: str, complaint: str, also_known: Iterable[str] = ()) -> None:
    try:
        gymnasium.spec(env_id)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        ours = [key for key in gymnasium.registry if key.startswith("xlstm_rl/")]
        raise ConfigError(f"{env_id!r} is {complaint}; {nearest(env_id, [*also_known, *ours])}") from error


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value, such as seed=3")
    source = f"override {override!r}"
    value = parse_yaml(text, source)
    for key in reversed(keys):
        value = {key: value}
    return _check(value, source)


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key, {})
        if key == "memory" and change.get("name", before.get("name")) != before.get("name", "xlstm"):
            before = {name: value for name, value in before.items() if name == "hidden_size"}
        merged[key] = _merge(before, change) if isinstance(change, Mapping) and isinstance(before, Mapping) else change
    return merged


def _build(values: Mapping[str, Any], source: str) -> TrainConfig:
    if "id" not in values.get("env", {}):
        raise ConfigError(f"{source} names no environment; set env.id to a gymnasium id")
    _check_registered(values["env"]["id"], f"no registered environment (env.id of {source})")
    try:
        config = build(TrainConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    assert isinstance(config, TrainConfig)
    return config
