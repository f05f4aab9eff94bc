"""Saving and loading agents and policies: data.json, weights as safetensors, and nothing that runs code."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from gymnasium import Space
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import (
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
    check_for_correct_spaces,
    get_device,
    get_system_info,
)
from torch import Tensor

from xlstm_rl.agents.archive import Archive, CheckpointError, Part, describe_part, read_archive, write_archive
from xlstm_rl.agents.description import DescriptionError, NotStoredError, describe, rebuild
from xlstm_rl.memory import leaves, pack, unpack

if TYPE_CHECKING:
    from xlstm_rl.agents.policy import XLSTMPolicy
    from xlstm_rl.agents.ppo import RecurrentPPO

File: TypeAlias = str | os.PathLike[str] | IO[bytes]
Model = TypeVar("Model", bound="RecurrentPPO")
Policy = TypeVar("Policy", bound="XLSTMPolicy")

# The part of a file that holds a training run; `load` passes over it.
TRAINING = "training"
_FUNCTIONS = "functions_saved_as_numbers"
_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "ent_coef")
# Without these no model can be built: what has no description is named when loading.
_ESSENTIAL = ("policy_class", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs")
_REMEDY = {"policy_class": "YourPolicy", "rollout_buffer_class": "YourBuffer"}
# Follow from others, or are stored in another way.
_DERIVED = ("lr_schedule", "policy_class", "_last_state")
# Made on loading, never read from a file.
_BUILT = ("policy", "device", "env", "rollout_buffer", "_vec_normalize_env", "_logger", "_custom_logger", "lr_schedule")
# Whatever wrong settings lead to in constructors that do not check them.
_BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
)
# Optimiser state that has the shape of its parameter.
_PER_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


class Contents(NamedTuple):
    """What a file of an agent holds."""

    name: str
    """Of the file, for errors."""
    libraries: dict[str, str]
    """Versions it was written with."""
    data: dict[str, Any]
    """Attributes of the agent."""
    functions: Any
    """Names of the schedules that were functions and are numbers in the file."""
    state: Any
    """Packed memory state [n_envs, N], or None."""
    groups: dict[str, Any]
    """State dicts of policy and optimiser."""
    parameter_order: list[str] | None
    """Names of the weights in the order of the optimiser; None for that of the policy."""


def save_model(
    model: RecurrentPPO,
    target: File,
    exclude: Iterable[str],
    include: Iterable[str],
    further: Mapping[str, Part] | None = None,
) -> None:
    """Write an agent, see `RecurrentPPO.save`, and further parts that loading it passes over."""
    optional = {*exclude, *model._excluded_save_params()} - set(include)
    groups = model.get_parameters()
    left_out = {*optional, *(name.split(".")[0] for name in groups), *_DERIVED}
    settings = {key: value for key, value in vars(model).items() if key not in left_out}
    data: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    functions: list[str] = []
    if "policy_class" not in optional:
        data["policy_class"] = _describe_policy_class(model)
    for name, value in settings.items():
        if name in _SCHEDULES and _is_function(value):
            value = _present_value(model, name, value)
            functions.append(name)
        try:
            data[name] = describe(value, name, tensors, leave_out=name in _ESSENTIAL)
        except DescriptionError as error:
            warnings.warn(
                f"{error}: it is not saved; load(path, custom_objects={{{name!r}: ...}}) can give it back", stacklevel=3
            )
    if "_last_state" not in optional and list(leaves(model._last_state)):
        data["_last_state"] = describe(pack(model._last_state), "_last_state", tensors)
    data[_FUNCTIONS] = functions
    parts = {"data": Part(data, tensors)} | {name: describe_part(group) for name, group in groups.items()}
    parts |= further or {}
    if isinstance(target, str | os.PathLike) and not Path(target).suffix:
        target = f"{os.fspath(target)}.zip"
    write_archive(target, "model", parts)


def read_contents(cls: type[RecurrentPPO], archive: Archive, custom_objects: Mapping[str, Any]) -> Contents:
    """What a file of `save_model` holds, nothing of it executed."""
    data = _read_data(cls, archive, custom_objects)
    return Contents(
        name=archive.name,
        libraries=archive.libraries,
        functions=data.pop(_FUNCTIONS, None),
        state=data.pop("_last_state", None),
        data=data,
        groups={name: archive.value(name) for name in archive.parts if name not in ("data", TRAINING)},
        parameter_order=None,
    )


def load_model(
    cls: type[Model],
    contents: Contents,
    env: GymEnv | None,
    *,
    device: torch.device | str = "auto",
    given: Collection[str] = (),
    force_reset: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> Model:
    """Make the agent that a file holds; see `RecurrentPPO.load`.

    Args:
        cls: of the agent.
        contents: of the file; used up.
        env: see `load`.
        device: see `load`.
        given: names of the attributes that were handed over.
        force_reset: see `load`.
        arguments: attributes to change.
    """
    data, state, arguments = contents.data, contents.state, arguments or {}
    _check_arguments(data, arguments)
    if "tensorboard_log" not in given:
        # a file must not choose where this machine writes
        data.pop("tensorboard_log", None)
    _warn_of_functions(data, contents.functions, {*given, *arguments})
    if env is not None:
        env = cls._wrap_env(env, data.get("verbose", 0))
        check_for_correct_spaces(env, data["observation_space"], data["action_space"])
        if force_reset:
            data["_last_obs"] = state = None
        elif env.num_envs != data.get("n_envs"):
            raise CheckpointError(
                f"{contents.name}: the episodes of {data.get('n_envs')!r:.50} environments cannot go on in "
                f"{env.num_envs}: hand over as many, or start new episodes with load(path, env)"
            )
        data["n_envs"] = env.num_envs
    try:
        model = cls(data["policy_class"], env, device=device, _init_setup_model=False)  # type: ignore[arg-type]
        vars(model).update(data)
        vars(model).update(arguments)
        model.check_settings()
        model._setup_model()
    except _BUILD_ERRORS as error:
        raise CheckpointError(
            f"no model can be built from the settings in {contents.name} and the arguments of load: "
            f"{type(error).__name__}: {error}"
        ) from error
    _set_weights(model, contents)
    if model.use_sde:
        model.policy.reset_noise()
    if state is not None and model._last_obs is not None:
        model._last_state = _rebuild_state(model, state, contents.name)
    return model


def print_system_info(libraries: Mapping[str, str]) -> None:
    """Print the versions here and those a file was written with."""
    print("== CURRENT SYSTEM INFO ==")
    get_system_info()
    print("== SAVED MODEL SYSTEM INFO ==", *(f"{name}: {version}" for name, version in libraries.items()))


def load_parameters(source: File) -> dict[str, Any]:
    """The state dicts of a saved agent by name, as `get_parameters` gives them."""
    archive = read_model(source)
    groups = {name: archive.value(name) for name in archive.parts if name not in ("data", TRAINING)}
    for name, group in groups.items():
        _check_group(group, name, archive.name)
    return groups


def save_policy(policy: XLSTMPolicy, target: File) -> None:
    """Write a policy; see `XLSTMPolicy.save`."""
    arguments = policy._get_constructor_parameters()
    arguments.pop("lr_schedule", None)
    parts = {"data": describe_part(arguments, leave_out=True), "policy": describe_part(policy.state_dict())}
    write_archive(target, "policy", parts)


def load_policy(
    cls: type[Policy], source: File, device: torch.device | str, custom_objects: Mapping[str, Any]
) -> Policy:
    """Read a policy; see `XLSTMPolicy.load`."""
    archive = read_archive(source, "policy")
    arguments = _rebuild_settings(archive, custom_objects, "custom_objects={{{top!r}: ...}}")
    try:
        policy = cls(**arguments, lr_schedule=ConstantSchedule(0.0))
    except _BUILD_ERRORS as error:
        raise CheckpointError(
            f"no {cls.__name__} can be built from the settings in {archive.name}: {type(error).__name__}: {error}"
        ) from error
    weights = archive.value("policy")
    _check_group(weights, "policy", archive.name)
    _check_weights(policy, weights, archive.name)
    policy.load_state_dict(weights)
    return policy.to(get_device(device))


def _describe_policy_class(model: RecurrentPPO) -> Any:
    """Aliases are what a file may name; any other class has to be handed over."""
    for alias, kind in model.policy_aliases.items():
        if kind is model.policy_class:
            return alias
    return describe(model.policy_class, "policy_class", {}, leave_out=True)


def _is_function(value: Any) -> bool:
    inner = value.value_schedule if isinstance(value, FloatSchedule) else value
    return callable(inner) and type(inner) not in (ConstantSchedule, LinearSchedule, FloatSchedule)


def _present_value(model: RecurrentPPO, name: str, function: Any) -> float:
    present = float(function(model._current_progress_remaining))
    warnings.warn(
        f"{name} is a function, which a safe file cannot keep: its present value {present:g} is saved in its place; "
        f"custom_objects={{{name!r}: function}} of load and resume restores it, and a LinearSchedule of "
        "Stable-Baselines3 would be kept",
        stacklevel=4,
    )
    return present


def _warn_of_functions(data: dict[str, Any], names: Any, given: Collection[str]) -> None:
    """Say which settings were functions when the agent was saved and are constants now."""
    for name in names if isinstance(names, list) else []:
        if name in _SCHEDULES and name in data and name not in given:
            warnings.warn(
                f"{name} was a function when the agent was saved and is the constant {data[name]} now: to train on, "
                f"hand it over as custom_objects={{{name!r}: function}}, which load and resume take",
                stacklevel=5,
            )


def find_file(source: File) -> File:
    """The file itself, or the one with ".zip" appended where only that exists."""
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
        with_suffix = f"{os.fspath(source)}.zip"
        return with_suffix if os.path.isfile(with_suffix) else source
    return source


def read_model(source: File) -> Archive:
    """Read the file of an agent, with or without ".zip"; see `read_archive`."""
    return read_archive(find_file(source), "model")


def _read_data(cls: type[RecurrentPPO], archive: Archive, custom_objects: Mapping[str, Any]) -> dict[str, Any]:
    data = _rebuild_settings(archive, custom_objects, "load(path, custom_objects={{{top!r}: {what}}})")
    for name in data:
        if name not in custom_objects and (name in _BUILT or _is_code(inspect.getattr_static(cls, name, None))):
            raise CheckpointError(f"{archive.name}: data.json sets {name!r}, which is no setting; not loaded")
    for name in ("observation_space", "action_space", "policy_class"):
        if name not in data:
            raise CheckpointError(f"{archive.name} holds no {name}: load(path, custom_objects={{{name!r}: ...}})")
        if name != "policy_class" and not isinstance(data[name], Space):
            raise CheckpointError(f"{archive.name}: {name} is {data[name]!r:.200}, no space")
    policy = data["policy_class"]
    if isinstance(policy, str):
        if policy not in cls.policy_aliases:
            raise CheckpointError(
                f"{archive.name} names the policy {policy!r:.200}, known are {sorted(cls.policy_aliases)}; hand the "
                "class over: load(path, custom_objects={'policy_class': YourPolicy})"
            )
        data["policy_class"] = cls.policy_aliases[policy]
    return data


def _is_code(attribute: Any) -> bool:
    return callable(attribute) or isinstance(attribute, property | classmethod | staticmethod)


def _rebuild_settings(archive: Archive, custom_objects: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """The values of data.json, those handed over in place of the stored ones; of `policy_kwargs`, entry by entry."""
    data = archive.parts.get("data", Part(None, {}))
    if not isinstance(data.tree, dict):
        raise CheckpointError(f"{archive.name}: data.json holds no settings")
    settings = dict(custom_objects)
    for name, part in data.tree.items():
        given = custom_objects.get(name)
        if name == "policy_kwargs" and isinstance(given, Mapping) and isinstance(part, dict):
            part = {key: value for key, value in part.items() if key not in given}
        elif name in custom_objects:
            continue
        try:
            settings[name] = rebuild(part, name, data.tensors)
            if given is not None:
                if not isinstance(settings[name], dict):
                    raise DescriptionError(name, "are no keyword arguments")
                settings[name] |= given
        except NotStoredError as error:
            hint = remedy.format(top=name, what=_REMEDY.get(name, "{...}"))
            raise CheckpointError(
                f"{archive.name}: {error}, which no safe file can hold; hand it over: {hint}"
            ) from error
        except (DescriptionError, RecursionError) as error:
            raise CheckpointError(f"{archive.name}, data.json: {error}") from error
    return settings


def _check_arguments(data: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    stored = data.get("policy_kwargs", {})
    if "policy_kwargs" in arguments and arguments["policy_kwargs"] != stored:
        raise ValueError(
            "The specified policy kwargs do not equal the stored policy kwargs. "
            f"Stored kwargs: {stored}, specified kwargs: {arguments['policy_kwargs']}"
        )


def _set_weights(model: RecurrentPPO, contents: Contents) -> None:
    groups = {}
    for name in model._get_torch_save_params()[0]:
        if name not in contents.groups:
            raise CheckpointError(f"{contents.name} holds no {name}.json; it is incomplete")
        group = groups[name] = contents.groups[name]
        _check_group(group, name, contents.name)
        owner = recursive_getattr(model, name)
        if isinstance(owner, torch.optim.Optimizer):
            if contents.parameter_order is not None:
                group = groups[name] = _reordered(model, group, contents.parameter_order)
            _check_optimizer(owner, group, contents.name)
        else:
            _check_weights(owner, group, contents.name)
    try:
        model.set_parameters(groups)
    except _BUILD_ERRORS as error:
        raise CheckpointError(f"{contents.name}: the parameters do not fit: {type(error).__name__}: {error}") from error


def _reordered(model: RecurrentPPO, group: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """The state of an optimiser whose weights came in another order."""
    names = [name for name, _ in model.policy.named_parameters()]
    places = [names.index(name) for name in order if name in names]
    state = {places[index]: kept for index, kept in group["state"].items() if index < len(places)}
    return {**group, "state": state}


def _check_group(group: Any, name: str, file: str) -> None:
    """State dicts hold numbers."""
    if not isinstance(group, dict):
        raise CheckpointError(f"{file}: {name}.json describes no state dict")
    for path, tensor in _named_tensors(group, ""):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CheckpointError(f"{file}: {name} has NaN in {path!r}; use an earlier checkpoint")


def _named_tensors(tree: Any, path: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from _named_tensors(part, f"{path}.{key}" if path else str(key))


def _check_weights(module: torch.nn.Module, weights: dict[str, Any], file: str) -> None:
    expected = {name: value for name, value in module.state_dict().items()}
    if set(expected) != set(weights):
        raise CheckpointError(
            f"{file}: the weights do not fit {type(module).__name__} as its settings build it: "
            f"missing {sorted(set(expected) - set(weights))}, unknown {sorted(set(weights) - set(expected))}"
        )
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, wanted in expected.items():
        weight = weights[name]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(weight, Tensor) or weight.shape != wanted.shape:
            found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise CheckpointError(f"{file}: weight {name!r} is {found}, its settings need {list(wanted.shape)}")
        if weight.is_floating_point() != wanted.is_floating_point() or weight.is_complex():
            raise CheckpointError(f"{file}: weight {name!r} is {weight.dtype}, its settings need {wanted.dtype}")
        if name in parameters and not bool(weight.isfinite().all()):
            raise CheckpointError(f"{file}: weight {name!r} is infinite; use an earlier checkpoint")


def _check_optimizer(optimizer: torch.optim.Optimizer, group: dict[str, Any], file: str) -> None:
    """What `load_state_dict` does not check itself."""
    parameters = [weight for part in optimizer.param_groups for weight in part["params"]]
    groups, state = group.get("param_groups"), group.get("state")
    if (
        not isinstance(state, dict)
        or not isinstance(groups, list)
        or not all(isinstance(part, dict) for part in groups)
    ):
        raise CheckpointError(f"{file}: the optimiser state lacks 'state' or 'param_groups'")
    indices = [part.get("params") for part in groups]
    sizes = [len(part["params"]) for part in optimizer.param_groups]
    if [len(part) if isinstance(part, list) else None for part in indices] != sizes:
        raise CheckpointError(f"{file}: the optimiser state is of another number of weights than {sum(sizes)}")
    flat = [index for part in indices for index in part]
    for index, kept in state.items():
        if index not in flat or not isinstance(kept, dict):
            raise CheckpointError(f"{file}: the optimiser state names weight {index!r:.50}, which there is not")
        wanted = parameters[flat.index(index)].shape
        for name in _PER_WEIGHT:
            value = kept.get(name)
            if value is not None and (not isinstance(value, Tensor) or value.shape != wanted):
                raise CheckpointError(f"{file}: optimiser state {name!r} of weight {index} is not {list(wanted)}")


def _rebuild_state(model: RecurrentPPO, packed: Any, file: str) -> Any:
    like = model.policy.initial_state(1)
    if not isinstance(packed, Tensor) or packed.shape[:1] != (model.n_envs,):
        raise CheckpointError(f"{file}: the memory state is not of {model.n_envs} environments; load with force_reset")
    return unpack(packed.to(model.device), like)
