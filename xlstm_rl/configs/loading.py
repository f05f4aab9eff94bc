"""The one loader: a preset, a YAML file or an environment id, plus overrides, to a `TrainConfig`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import gymnasium
import yaml

from xlstm_rl.configs.schema import EnvConfig, MemoryConfig, PolicyConfig, PPOConfig, TrainConfig, agent_arguments
from xlstm_rl.configs.validation import (
    NOTHING_MADE,
    ConfigError,
    build,
    check_part,
    closest,
    is_settings,
    parse_yaml,
    plain,
)

_UNKNOWN = "neither a preset nor a registered environment"


def preset_names() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def load(name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """The configuration of `name`, changed by overrides.

    Args:
        name: a preset, a path ending in ".yaml", or any gymnasium id (then with the settings of general.yaml, which are
            good on most tasks), "xlstm_rl/" before it may be left out. The module of an id such as "module:Env-v0" is
            imported, as `gymnasium.make` does. A file starts from its `base`: a preset, an id, or "general" for the
            settings of general.yaml; without one, from the defaults of `TrainConfig`.
        overrides: "a.b=value" each, the value spelled as in YAML; later ones win. Another `memory.name` than the one
            of `name` drops the memory settings there, `hidden_size` excepted, because another memory has others; the
            overrides all stay, in whatever order they are given.

    Raises:
        ConfigError: the name or a key is unknown, or a value is impossible; the message names it, where it stands and
            the remedy.
    """
    values = _read(Path(name)) if _is_path(name) else _named(name, _UNKNOWN)
    changes: dict[str, Any] = {}
    for override in overrides:
        changes = _merge(changes, _parse_override(override))
    # what comes with the package has been made by tests
    context = None if changes or _is_path(name) else NOTHING_MADE
    return _build(_merge(_for_memory(values, changes), changes), name, context)


def load_file(path: Path) -> TrainConfig:
    """The configuration in a YAML file, such as the config.yaml of a run folder.

    An `env.id` such as "module:Env-v0" imports the module, here too: a configuration is trusted as much as the command
    that names it.

    Raises:
        ConfigError: as for `load`.
    """
    return _build(_read(path), str(path))


def left_to_defaults(path: Path) -> list[str]:
    """Settings, "a.b" each, that a file does not name; none of what `dump` wrote.

    Raises:
        ConfigError: as for `load`.
    """
    return list(_unnamed(plain(load_file(path)), _read(path)))


def _unnamed(values: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if key not in named:
            yield key
        elif isinstance(value, Mapping) and isinstance(named[key], Mapping):
            yield from (f"{key}.{inner}" for inner in _unnamed(value, named[key]))


def dump(config: TrainConfig) -> str:
    """The whole configuration as YAML, defaults included; `load_file` reads it back equal."""
    return yaml.safe_dump(plain(config), sort_keys=False, width=120)


def differences(config: TrainConfig) -> dict[str, Any]:
    """The configuration without what is as by default: the same whatever settings are added later."""
    return _without(plain(config), plain(TrainConfig(EnvConfig(config.env.id))))


def _without(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What of nested values is not as in `defaults`."""
    left: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            left |= {key: _without(value, default)} if _without(value, default) else {}
        elif key not in defaults or value != default:
            left[key] = value
    return left


def general_settings(**changes: Any) -> dict[str, Any]:
    """Recommended keyword arguments of `xlstm_rl.RecurrentPPO`, chosen on the tasks of the suite together.

    They are what `xlstm-rl train` takes for a plain environment id, read from general.yaml: an "sm" memory for the
    actor and another for the critic, larger minibatches, and so on. The defaults of the constructor itself are those of
    sb3-contrib.

    The command line lets the entropy bonus fall linearly to 0 over the run, and the learning rate over its end. Here
    both are constant, the bonus at its mean there, so that `learn` may be called again and again: Stable-Baselines3's
    schedules end with each call, and one that falls to 0 would leave a call of a single rollout nothing. For one long
    call, `lr_schedule="late", ent_schedule="linear"` gives those of the command line.

    Left out is what belongs to the environment or to a single run. The command line steps 16 copies of the environment
    and normalises observations and rewards; in Python, `make_vec_env` and `VecNormalize` do that. Tasks that pay about
    1 learn without normalisation; returns of another scale, as those of CartPole, need it. The command line also sets
    `device="cpu"` and a seed.

    Example:
        ```
        env = VecNormalize(make_vec_env("CartPole-v1", n_envs=16))
        model = RecurrentPPO("MlpXLSTMPolicy", env, device="cpu", **general_settings(gamma=0.9))
        ```

    Args:
        **changes: keyword arguments of `RecurrentPPO` that replace the recommended ones; those with a field in
            `PPOConfig` are checked as in a configuration. A `learning_rate` given as a number is where the schedule
            starts if `lr_schedule="linear"` lets it fall; likewise `ent_coef` and `ent_schedule`. `policy_kwargs` and
            the `memory_kwargs` in it are merged key by key; another `memory` starts from its own defaults.

    Raises:
        ConfigError: a name is unknown or a value is impossible.
    """
    from xlstm_rl.agents import RecurrentPPO

    policy_kwargs = dict(changes.pop("policy_kwargs", None) or {})
    memory = dict(policy_kwargs.pop("memory_kwargs", None) or {})
    if "memory" in policy_kwargs:
        memory["name"] = policy_kwargs.pop("memory")
    policy = {key: policy_kwargs.pop(key) for key in ("critic_memory",) if key in policy_kwargs}
    # what no configuration holds: functions of the progress, and what is the model's alone
    alone = inspect.signature(RecurrentPPO).parameters.keys() - {f.name for f in fields(PPOConfig)} - {"policy", "env"}
    kept = {key: changes.pop(key) for key in list(changes) if key in alone or callable(changes[key])}
    wanted = _check({"memory": memory, "policy": policy, "ppo": changes}, "general_settings()")
    general = _general()
    general["ppo"] |= {"lr_schedule": "constant"}
    if "ent_schedule" not in changes:
        general["ppo"] |= {"ent_coef": general["ppo"]["ent_coef"] / 2, "ent_schedule": "constant"}
    values = _merge(_for_memory(general, wanted), wanted)
    arguments = agent_arguments(
        build(MemoryConfig, values["memory"], "general_settings()"),
        build(PolicyConfig, values["policy"], "general_settings()"),
        build(PPOConfig, values["ppo"], "general_settings()"),
    )
    return {**arguments, **kept, "policy_kwargs": {**arguments["policy_kwargs"], **policy_kwargs}}


def _is_path(name: str) -> bool:
    return name not in preset_names() and name.endswith((".yaml", ".yml"))


def _named(name: str, complaint: str, also_known: Iterable[str] = ()) -> dict[str, Any]:
    if name in preset_names():
        return _read_own(_presets() / f"{name}.yaml", f"preset {name}.yaml")
    env_id = f"xlstm_rl/{name}" if f"xlstm_rl/{name}" in gymnasium.registry else name
    _check_registered(env_id, complaint, [*also_known, *preset_names()])
    return _merge(_general(), {"env": {"id": env_id}})


def _general() -> dict[str, Any]:
    return _read_own(resources.files("xlstm_rl.configs") / "general.yaml", "general.yaml")


def _presets() -> Any:
    return resources.files("xlstm_rl.configs") / "presets"


def _read_own(file: Any, source: str) -> dict[str, Any]:
    return _on_base(parse_yaml(file.read_text(encoding="utf-8"), source), source)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML that can be read: it is no UTF-8 text ({error.reason})") from error
    return _on_base(parse_yaml(text, str(path)), str(path))


def _on_base(values: object, source: str) -> dict[str, Any]:
    # Without a base the defaults and not the general settings: what a run folder's configuration leaves out, memory
    # settings and keys that came later, must keep its meaning.
    if not isinstance(values, dict) or "base" not in values:
        return _check(values, source)
    base = _base(values.pop("base"), source)
    changes = _check(values, source)
    return _merge(_for_memory(base, changes), changes)


def _base(name: object, source: str) -> dict[str, Any]:
    if not isinstance(name, str) or _is_path(name):
        raise ConfigError(f"base={name!r} of {source} must be a preset, an environment id or 'general'")
    return _general() if name == "general" else _named(name, f"{_UNKNOWN} (base of {source})", ["general"])


def _check(values: object, source: str) -> dict[str, Any]:
    return check_part(TrainConfig, {} if values is None else values, source)


def _check_registered(env_id: str, complaint: str, also_known: Iterable[str] = ()) -> None:
    module, colon, registered_id = env_id.rpartition(":")
    if colon:
        _import_module(module, env_id)
    try:
        gymnasium.spec(registered_id)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        hint = _hint(env_id, [*also_known, *gymnasium.registry])
        raise ConfigError(f"{env_id!r} is {complaint}; {hint}") from error


def _hint(env_id: str, known: Iterable[str]) -> str:
    similar = closest(env_id, known)
    # An id of one's own may resemble a registered one, as MyCartPole-v1 does.
    may_be_own = similar is None or re.search(r"-v\d+$", env_id) is not None
    if ":" in env_id or env_id.startswith("xlstm_rl/") or not may_be_own:
        return similar or "`xlstm-rl list` shows them"
    own = f"that a module of yours registers is written your_module:{env_id}"
    return f"`xlstm-rl list` shows them; one {own}" if similar is None else f"{similar} One {own}"


def _import_module(module: str, env_id: str) -> None:
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"{env_id!r} is no environment id: what stands before ':' must be a module, such as my.envs")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"module {module!r} of environment {env_id!r} cannot be imported: {error}; install it or put its folder "
            "on PYTHONPATH"
        ) from error


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value, such as seed=3")
    source = f"override {override!r}"
    value = parse_yaml(text, source)
    _check_section(keys, value, override)
    for key in reversed(keys):
        value = {key: value}
    return _check(value, source)


def _check_section(keys: list[str], value: object, override: str) -> None:
    """Refuse a section that lacks its key, with the whole one."""
    sections = {name: kind for name, kind in get_type_hints(TrainConfig).items() if is_settings(kind)}
    first, text = keys[0], override.partition("=")[2]
    if len(keys) == 1 and first in sections and not isinstance(value, Mapping):
        example = f"memory.name={text}" if first == "memory" else f"{first}.{fields(sections[first])[0].name}=..."
        raise ConfigError(f"{first!r} in override {override!r} is a section; name a key in it, such as {example}")


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key, {})
        merged[key] = _merge(before, change) if isinstance(change, Mapping) and isinstance(before, Mapping) else change
    return merged


def _for_memory(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    before = values.get("memory", {})
    name = before.get("name", MemoryConfig.name)
    if changes.get("memory", {}).get("name", name) == name:
        return values
    return {**values, "memory": {key: value for key, value in before.items() if key == "hidden_size"}}


def _build(values: Mapping[str, Any], source: str, context: str | None = None) -> TrainConfig:
    if "id" not in values.get("env", {}):
        raise ConfigError(f"{source} names no environment; set env.id to a gymnasium id")
    _check_registered(values["env"]["id"], f"no registered environment (env.id of {source})")
    return build(TrainConfig, values, source, context)
