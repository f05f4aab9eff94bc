"""What training needs from a file besides weights: optimisers that fit, random numbers, episodes, statistics."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorWrapper
from gymnasium.wrappers.utils import RunningMeanStd as GymnasiumMeanStd
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize
from torch import Tensor

from xlstm_rl.agents.checkpoint import CheckpointError, DescriptionError, class_name, describe, named_class
from xlstm_rl.vec_envs.env_contract import calls_one_alone, entries, has_method, innermost, map_obs

_NORMALIZER = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")


class TrainingPoint(NamedTuple):
    """A training run between two rollouts."""

    attributes: dict[str, Any]
    """Of the model, those that a rollout changes."""
    random: dict[str, Any]
    """States of the generators of Python, NumPy and torch."""
    wrappers: list[Any]
    """State of every vector wrapper, the outermost first."""


def mark_point(model: OnPolicyAlgorithm) -> TrainingPoint:
    """Note the present, which must lie between two rollouts; the environments keep theirs until the next mark."""
    env = env_of(model)
    if has_method(env, "mark_point"):
        env.env_method("mark_point")
    changing = ("num_timesteps", "ep_info_buffer", "ep_success_buffer")
    names = [name for name in vars(model) if name in changing or name.startswith("_last_")]
    # deep: acting writes memory states over those before
    attributes = {name: copy.deepcopy(vars(model)[name]) for name in names}
    return TrainingPoint(
        attributes, _random_state(model.device), [_wrapper_state(wrapper) for wrapper in _wrappers(env)]
    )


def read_training(env: VecEnv, point: TrainingPoint) -> dict[str, Any]:
    """The training run at a point as plain values; `restore_training` takes them."""
    episodes = env.env_method("resume_point") if has_method(env, "resume_point") else None
    return {"random": point.random, "wrappers": point.wrappers, "episodes": episodes}


def restore_training(env: VecEnv, state: Mapping[str, Any], device: torch.device) -> str | None:
    """Bring environments, wrappers and generators to where `read_training` found them.

    Returns:
        Why all environments must start new episodes; None if the running ones go on.

    Raises:
        KeyError, IndexError, RuntimeError, TypeError, ValueError: this is no such state, or not of such environments.
    """
    wrappers = list(_wrappers(env))
    if len(wrappers) != len(state["wrappers"]):
        raise ValueError(f"the run had {len(state['wrappers'])} vector wrappers, the environment has {len(wrappers)}")
    for wrapper, kept in zip(wrappers, state["wrappers"], strict=True):
        _set_wrapper_state(wrapper, kept)
    _warn_of_statistics(env)
    restarted = _resume_episodes(env, state["episodes"])
    # replaying episodes may draw random numbers, so these come last
    _set_random_state(state["random"], device)
    return restarted


def env_of(model: OnPolicyAlgorithm) -> VecEnv:
    """The environment of an agent.

    Raises:
        ValueError: it has none.
    """
    if model.env is None:
        raise ValueError("the agent has no environment: hand one to load, resume or set_env")
    return model.env


def _resume_episodes(env: VecEnv, points: Any) -> str | None:
    if points is None:
        return "their state was not noted (wrap each in xlstm_rl.envs.Resumable)"
    if not has_method(env, "resume_at") or not calls_one_alone(env):
        return "these environments cannot be brought back (wrap each in xlstm_rl.envs.Resumable)"
    for index, point in enumerate(points):
        if point is None:
            return (
                f"the episode of environment {index} was not kept: it was too long, its worker had been restarted, or "
                "its random generator cannot be read"
            )
        if env.env_method("resume_at", point, indices=index) != [True]:
            return f"environment {index} is not deterministic: its episode, played again, went another way or failed"
    return None


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, key, position, has_gauss, cached = np.random.get_state()
    # asking for it would start CUDA, which a run on the CPU has no use for
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(key).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, np.array(key, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)


def _wrappers(env: VecEnv) -> Iterator[VecEnvWrapper]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def _wrapper_state(wrapper: VecEnvWrapper) -> Any:
    """Arrays are copied, for wrappers change them in place."""
    if hasattr(type(wrapper), "get_state"):
        return copy.deepcopy(wrapper.get_state())
    if isinstance(wrapper, VecNormalize):
        # before the first reset there is no observation
        running = {
            "returns": wrapper.returns,
            "old_reward": wrapper.old_reward,
            "old_obs": vars(wrapper).get("old_obs"),
        }
        return normalizer_state(wrapper) | {"training": wrapper.training} | copy.deepcopy(running)
    if isinstance(wrapper, VecFrameStack):
        return copy.deepcopy(_stacks(wrapper))
    if isinstance(wrapper, VecMonitor):
        return {name: copy.copy(getattr(wrapper, name)) for name in ("episode_returns", "episode_lengths")}
    return {"unknown": copy.deepcopy(_plain_attributes(wrapper))}


def _set_wrapper_state(wrapper: VecEnvWrapper, state: Any) -> None:
    if hasattr(type(wrapper), "set_state"):
        wrapper.set_state(state)
    elif isinstance(wrapper, VecNormalize):
        # files of format 1 have no settings
        _set_normalizer(wrapper, {"settings": _settings(wrapper), **state})
        wrapper.training = _checked("training", state.get("training", wrapper.training), bool)
        for name in ("returns", "old_reward", "old_obs"):
            setattr(wrapper, name, state[name])
    elif isinstance(wrapper, VecFrameStack):
        for key, stack in _stacks(wrapper).items():
            stack[...] = state[key]
    elif isinstance(wrapper, VecMonitor):
        wrapper.episode_returns, wrapper.episode_lengths = state["episode_returns"], state["episode_lengths"]
    elif state is not None:
        _warn_of_changes(wrapper, state["unknown"])


_GENERATORS: dict[type, Callable[[Any], Any]] = {
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: generator.get_state(legacy=False),
    random.Random: lambda generator: generator.getstate(),
    torch.Generator: lambda generator: generator.get_state(),
}


def _plain_attributes(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """What a wrapper that nobody here knows keeps, as far as it is data; other known ones keep nothing for long."""
    if type(wrapper).__module__.startswith(("stable_baselines3.", "xlstm_rl.")):
        return {}
    given = {"num_envs", "render_mode", "class_attributes", "observation_space", "action_space", "venv"}
    told = {key: _told(value) for key, value in vars(wrapper).items() if key not in given}
    return {key: value for key, value in told.items() if value is not Ellipsis}


def _told(value: Any) -> Any:
    """The data in a value: of a random generator its state, of other objects what they hold; Ellipsis where unknown."""
    for kind, state in _GENERATORS.items():
        if isinstance(value, kind):
            return state(value)
    held = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module) else value
    for data in (value, held):
        try:
            describe(data, "", {})
        except DescriptionError:
            continue
        return data
    return Ellipsis


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple | deque) and isinstance(other, list | tuple | deque):
        return len(one) == len(other) and all(map(_same, one, other))
    return np.array_equal(one, other)


def _warn_of_changes(wrapper: VecEnvWrapper, before: Mapping[str, Any]) -> None:
    now = _plain_attributes(wrapper)
    changed = [name for name, value in before.items() if not _same(value, now.get(name, Ellipsis))]
    if changed:
        warnings.warn(
            f"{type(wrapper).__name__} starts anew with other values of {', '.join(changed)} than the run had, which "
            "may make it another run: give the wrapper get_state() and set_state(state), and they are kept",
            stacklevel=2,
        )


def _warn_of_statistics(env: VecEnv) -> None:
    """Wrappers around a vector environment of gymnasium are none of Stable-Baselines3's, and are not looked into."""
    layer = getattr(innermost(env), "env", None)
    while isinstance(layer, VectorWrapper):
        if any(isinstance(value, GymnasiumMeanStd) for value in vars(layer).values()):
            warnings.warn(
                f"the running statistics of gymnasium's vector wrapper {type(layer).__name__} are in no file and start "
                "anew, which makes it another run: use VecNormalize, whose statistics are kept",
                stacklevel=2,
            )
        layer = layer.env


def _stacks(wrapper: VecFrameStack) -> dict[str, np.ndarray]:
    """The stacked frames by key; one key for observations that are no Dict."""
    stacked: Any = wrapper.stacked_obs
    inner = getattr(stacked, "sub_stacked_observations", None)
    parts = {"": stacked} if inner is None else inner
    return {key: part.stacked_obs for key, part in parts.items()}


def normalizer_state(normalizer: VecNormalize) -> dict[str, Any]:
    """Settings and running statistics as plain values, every number exact; `make_normalizer` takes them."""
    return {"settings": _settings(normalizer), "statistics": normalizer_statistics(normalizer)}


def make_normalizer(state: Any, env: VecEnv) -> VecNormalize:
    """Wrap an environment with the settings and statistics that `normalizer_state` told.

    Args:
        state: as told; nothing in it is run.
        env: with the observation space that was normalised.

    Raises:
        ValueError: this is no such state, its shapes do not fit the environment, or numbers are not finite.
    """
    try:
        settings = state["settings"]
        normalizer = VecNormalize(env, **{name: settings[name] for name in ("norm_obs", "norm_obs_keys", "clip_obs")})
        _set_normalizer(normalizer, state)
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are no normalisation statistics: {error!r}") from error
    return normalizer


@contextmanager
def statistics_kept(normalizer: VecNormalize | None) -> Iterator[None]:
    """The statistics stay as they are while episodes are played that are no training; None has none."""
    if normalizer is None:
        yield
        return
    training, normalizer.training = normalizer.training, False
    try:
        yield
    finally:
        normalizer.training = training


def normalizer_statistics(normalizer: VecNormalize) -> dict[str, Any]:
    """The running statistics as numbers and lists of them, every number exact."""
    statistics: dict[str, Any] = {"returns": _moments(normalizer.ret_rms)}
    if normalizer.norm_obs:
        statistics["observations"] = map_obs(_moments, normalizer.obs_rms)
    return statistics


def restore_statistics(normalizer: VecNormalize, statistics: dict[str, Any]) -> None:
    """Take over what `normalizer_statistics` told.

    Raises:
        KeyError, TypeError: these are no statistics.
        ValueError: they are of another shape or not finite.
    """
    _restore(normalizer.ret_rms, statistics["returns"], "returns")
    if normalizer.norm_obs:
        for key, part in entries(normalizer.obs_rms):
            given = statistics["observations"]
            _restore(part, given if key is None else given[key], "observations" if key is None else key)


def _settings(normalizer: VecNormalize) -> dict[str, Any]:
    return {name: getattr(normalizer, name) for name in _NORMALIZER}


def _set_normalizer(normalizer: VecNormalize, state: Mapping[str, Any]) -> None:
    settings = state["settings"]
    normalizer.norm_obs = _checked("norm_obs", settings["norm_obs"], bool)
    if normalizer.norm_obs and not hasattr(normalizer, "obs_rms"):
        raise ValueError("the run normalised observations, the VecNormalize given was made with norm_obs=False")
    normalizer.norm_reward = _checked("norm_reward", settings["norm_reward"], bool)
    for name in ("clip_obs", "clip_reward", "gamma", "epsilon"):
        value = _checked(name, settings[name], int | float)
        if not value >= 0:
            raise ValueError(f"{name}={value} of VecNormalize must not be negative")
        setattr(normalizer, name, value)
    if settings["norm_obs_keys"] != normalizer.norm_obs_keys:
        raise ValueError(
            f"the run normalised the keys {settings['norm_obs_keys']!r:.200}, the VecNormalize given normalises "
            f"{normalizer.norm_obs_keys}"
        )
    restore_statistics(normalizer, state["statistics"])


def _checked(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r:.100} of VecNormalize is no {kind}")
    return value


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _restore(rms: RunningMeanStd, given: dict[str, Any], name: str) -> None:
    mean, var = np.array(given["mean"], np.float64), np.array(given["var"], np.float64)
    count, expected = float(given["count"]), np.shape(rms.mean)
    if mean.shape != expected or var.shape != expected:
        raise ValueError(f"statistics of {name} have shape {mean.shape}, the environment's are {expected}")
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all() and 0 < count < np.inf):
        raise ValueError(f"statistics of {name} are not finite")
    rms.mean, rms.var, rms.count = mean, var, count


OPTIMIZER = "policy.optimizer"
_WITHOUT = "; load(path, custom_objects={'policy.optimizer': None}) takes the weights alone"
# Optimiser state that does not have the shape of its weight.
_OTHER_SHAPES = ("step", "row_var", "col_var", "mu_product", "eta", "mu")
# Sums and means of squares, and lengths: a root is taken of them, or they are divided by.
_NOT_NEGATIVE = (
    *("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "step_size"),
    *("variance", "row_var", "col_var"),
)


class MisfitError(ValueError):
    """The state of an optimiser is sound, but of other weights or of another class than the optimiser here."""


def frozen_names(policy: torch.nn.Module) -> list[str]:
    """Names of the weights that are not trained."""
    return [name for name, weight in policy.named_parameters() if not weight.requires_grad]


def freeze(policy: torch.nn.Module, frozen: Any, file: str) -> None:
    """Let train all weights but those named; None, of files of format 1, leaves them as they are.

    Raises:
        CheckpointError: these are no names of weights.
    """
    if frozen is None:
        return
    weights = dict(policy.named_parameters())
    if not isinstance(frozen, list) or not _are_texts(frozen) or not weights.keys() >= set(frozen):
        raise CheckpointError(f"{file}: frozen_parameters are {frozen!r:.200}, which are no weights of the policy")
    for name, weight in weights.items():
        weight.requires_grad_(name not in frozen)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layers_in_words(policy: torch.nn.Module) -> dict[str, str]:
    """What every layer does beside its weights, by name, as far as it can be told: class, settings, what was added."""
    told = {}
    for name, layer in policy.named_modules():
        added = any(getattr(layer, hooks) for hooks in _HOOKS) or "forward" in vars(layer)
        told[name] = f"{type(layer).__qualname__}({layer.extra_repr()}){' and hooks' if added else ''}"
    return told | {name: "hooks" for name, weight in policy.named_parameters() if weight._backward_hooks}


def set_weights(module: torch.nn.Module, weights: Any, name: str, file: str) -> None:
    """Load a state dict, in the dtype that it has.

    Args:
        module: takes the weights.
        weights: state dict.
        name: of the part of the file, for errors.
        file: its name, for errors.

    Raises:
        CheckpointError: names, shapes or kinds do not fit, or numbers are none.
    """
    check_numbers(weights, name, file)
    expected = module.state_dict()
    if set(expected) != set(weights):
        raise CheckpointError(
            f"{file}: the weights do not fit {type(module).__name__} as its settings build it: "
            f"missing {sorted(set(expected) - set(weights))}, unknown {sorted(set(weights) - set(expected))}; where "
            "layers were changed after the agent was made, make it, change them likewise and call set_parameters(path)"
        )
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    dtypes = {weights[name].dtype for name in parameters if isinstance(weights[name], Tensor)}
    if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point:
        # as after policy.double()
        module.to(dtype)
        expected = module.state_dict()
    for name, wanted in expected.items():
        weight = weights[name]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(weight, Tensor) or weight.shape != wanted.shape:
            found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise CheckpointError(f"{file}: weight {name!r} is {found}, its settings need {list(wanted.shape)}")
        if weight.is_floating_point() != wanted.is_floating_point() or weight.is_complex():
            raise CheckpointError(f"{file}: weight {name!r} is {weight.dtype}, its settings need {wanted.dtype}")
        # as used: a float64 may be too large for a float32
        lost = weight.isfinite() & ~weight.to(wanted.dtype).isfinite()
        if bool(lost.any()) or (name in parameters and not bool(weight.isfinite().all())):
            raise CheckpointError(f"{file}: weight {name!r} is infinite; use an earlier checkpoint")
    _check_shared(module, weights, file)
    module.load_state_dict(weights)


def _check_shared(module: torch.nn.Module, weights: Mapping[str, Any], file: str) -> None:
    """Weights that are one in the file must be one here, or training would make them two."""
    here, first = module.state_dict(), {id(weight): name for name, weight in reversed(list(weights.items()))}
    for name, weight in weights.items():
        other = first[id(weight)]
        if isinstance(weight, Tensor) and weight.numel() and here[name].data_ptr() != here[other].data_ptr():
            raise CheckpointError(
                f"{file}: weights {other!r} and {name!r} are one, and two in {type(module).__name__} as its settings "
                "build it: make the agent, tie them likewise and call set_parameters(path)"
            )


def check_numbers(group: Any, name: str, file: str) -> None:
    """Refuse what is no state dict or holds NaN.

    Raises:
        CheckpointError: names the entry.
    """
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


def name_weights(policy: Any, kept: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the policy's optimiser with its class and the names of its weights, group by group."""
    names = {id(weight): name for name, weight in policy.named_parameters()}
    groups = [
        {**told, "param_names": [names.get(id(weight), "") for weight in group["params"]]}
        for told, group in zip(kept["param_groups"], policy.optimizer.param_groups, strict=True)
    ]
    return {**kept, "param_groups": groups, "class": class_name(type(policy.optimizer))}


def fit_optimizer(policy: Any, group: Any, file: str, order: list[str] | None = None) -> dict[str, Any]:
    """A state dict for the policy's optimiser, which is made anew where that of the file has other groups or a class.

    Args:
        policy: whose `optimizer` it is for.
        group: state dict, with names and class as `name_weights` adds them or without.
        file: for errors.
        order: names of the weights of a single group that has no names of its own.

    Raises:
        MisfitError: it is of other weights, or of a class that is not known here.
        CheckpointError: it is damaged.
    """
    check_numbers(group, OPTIMIZER, file)
    state, groups = group.get("state"), group.get("param_groups")
    if (
        not isinstance(state, dict)
        or not isinstance(groups, list)
        or not all(isinstance(part, dict) and isinstance(part.get("params"), list) for part in groups)
    ):
        raise CheckpointError(f"{file}: the optimiser state lacks 'state' or 'param_groups'{_WITHOUT}")
    groups = [dict(part) for part in groups]
    names = [part.pop("param_names", None) for part in groups]
    weights = dict(policy.named_parameters())
    if order is not None and len(groups) == 1:
        # a state dict names shared weights several times
        names = [[name for name in order if name in weights]]
    if all(isinstance(part, list) for part in names):
        flat = [name for part in names for name in part]
        if [len(part) for part in names] != [len(part["params"]) for part in groups] or not _are_texts(
            [*flat, group.get("class", "")]
        ):
            raise CheckpointError(f"{file}: the optimiser state has another number of weights than names{_WITHOUT}")
        unknown = [name for name in flat if name not in weights]
        if unknown:
            raise MisfitError(f"it is of weights that the policy does not have, {unknown!r:.200}")
        _form_groups(policy, [[weights[name] for name in part] for part in names], groups, group.get("class"), file)
    formed = [part["params"] for part in policy.optimizer.param_groups]
    if [len(part) for part in formed] != [len(part["params"]) for part in groups]:
        raise MisfitError(
            f"it is of groups of {[len(part['params']) for part in groups]} weights, the optimiser here of "
            f"{[len(part) for part in formed]}"
        )
    _check_optimizer(policy.optimizer, groups, state, file)
    return {"state": state, "param_groups": groups}


def _form_groups(policy: Any, weights: list[list[Tensor]], groups: list[dict[str, Any]], kind: Any, file: str) -> None:
    """Make the policy's optimiser anew if it is of another class, or of other groups, than those of a file."""
    built = policy.optimizer
    same_class = kind in (None, class_name(type(built)))
    here = [[id(weight) for weight in part["params"]] for part in built.param_groups]
    if same_class and here == [[id(weight) for weight in part] for part in weights]:
        return
    make = type(built) if same_class else named_class(kind)
    if make is None or not issubclass(make, torch.optim.Optimizer):
        raise MisfitError(f"it is of the class {kind!r:.200}, the optimiser here of {class_name(type(built))}")
    formed: Any = [{**part, "params": params} for part, params in zip(groups, weights, strict=True)]
    try:
        policy.optimizer = make(formed)  # type: ignore[call-arg]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no {kind} can be made of the groups in it: {error}{_WITHOUT}") from error


def _check_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any, file: str) -> None:
    """What `load_state_dict` does not check itself, after the conversion that it does."""
    for path, tensor in _named_tensors(state, "state"):
        if tensor.is_floating_point() and bool(tensor.isinf().any()):
            raise CheckpointError(f"{file}: {OPTIMIZER} has infinity in {path!r}{_WITHOUT}")
    if not class_name(type(optimizer)).startswith(("torch.", "stable_baselines3.")):
        # what else is right, only its own class knows
        return
    weights = [weight for part in optimizer.param_groups for weight in part["params"]]
    flat = [index for part in groups for index in part["params"]]
    known = inspect.signature(type(optimizer).__init__).parameters
    for part in groups:
        settings = {key: value for key, value in part.items() if key in known and key != "params"}
        try:
            if not all(np.isfinite(number) for number in _numbers(settings)):
                raise ValueError(f"a setting is not finite: {settings}")
            # the constructor checks them
            type(optimizer)([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the optimiser state has impossible settings: {error}{_WITHOUT}") from error
    for index, kept in state.items():
        if index not in flat or not isinstance(kept, dict):
            raise CheckpointError(f"{file}: the optimiser state names weight {index!r:.50}, which there is not")
        weight = weights[flat.index(index)]
        for name, value in kept.items():
            wrong = _wrong_state(name, value, weight)
            if wrong:
                raise CheckpointError(f"{file}: optimiser state {name!r:.50} of weight {index} {wrong}{_WITHOUT}")


def _wrong_state(name: Any, value: Any, weight: Tensor) -> str | None:
    """What is wrong with an entry of an optimiser's state; None if nothing is."""
    if value is None and name == "momentum_buffer":
        # before the first step
        return None
    if not isinstance(value, Tensor):
        if not isinstance(value, int | float):
            return f"is {value!r:.50}, no number"
        value = torch.tensor(float(value))
    elif value.shape != weight.shape and name not in _OTHER_SHAPES:
        return f"is {list(value.shape)}, not {list(weight.shape)}"
    elif not value.is_floating_point() and value.ndim:
        return f"is {value.dtype}, not {weight.dtype}"
    if name != "step" and value.is_floating_point():
        value = value.to(weight.dtype)
    if not bool(value.isfinite().all()):
        return "is not finite"
    if name in _NOT_NEGATIVE and bool((value < 0).any()):
        return "is negative"
    return None


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _numbers(tree: Any) -> Iterable[float]:
    if isinstance(tree, int | float):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _numbers(part)
