"""How agents, policies and training runs are saved, loaded and resumed, with the interface of Stable-Baselines3."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import warnings
import zipfile
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import Space
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import (
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
    check_for_correct_spaces,
    get_device,
    get_system_info,
)
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor

from xlstm_rl.agents.checkpoint import (
    Archive,
    CheckpointError,
    DescriptionError,
    File,
    NotStoredError,
    Part,
    describe,
    describe_part,
    read_archive,
    rebuild,
    write_archive,
)
from xlstm_rl.agents.losses import AdvantageScale, LateSchedule
from xlstm_rl.agents.parallel import Ranks
from xlstm_rl.agents.training_state import (
    OPTIMIZER,
    MisfitError,
    TrainingPoint,
    check_numbers,
    env_of,
    fit_optimizer,
    freeze,
    frozen_names,
    layers_in_words,
    make_normalizer,
    mark_point,
    name_weights,
    normalizer_state,
    read_training,
    restore_training,
    set_weights,
)
from xlstm_rl.memory import leaves, pack, unpack
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError, seed_envs

if TYPE_CHECKING:
    from typing_extensions import Self

Policy = TypeVar("Policy", bound=BasePolicy)

# Parts of a file beside those of the agent; `load` passes over them.
TRAINING, NORMALIZER = "training", "normalizer"
POLICY = "policy"
# Entries of the settings that are no attributes.
_FUNCTIONS, _FROZEN, _MASKED = "functions_saved_as_numbers", "frozen_parameters", "trained_with_masks"
_LAYERS = "layers"
_SCHEDULES = ("learning_rate", "lr_schedule", "clip_range", "clip_range_vf", "ent_coef")
# Without these no model can be built: what has no description is named when loading.
_ESSENTIAL = ("policy_class", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs")
_REMEDY = {"policy_class": "YourPolicy", "rollout_buffer_class": "YourBuffer"}
# Stored in another way.
_DERIVED = ("lr_schedule", "policy_class", "_last_state")
# Made on loading, never read from a file.
_BUILT = ("policy", "device", "env", "rollout_buffer", "_vec_normalize_env", "_logger", "_custom_logger")
# What an agent learnt and counted, beside its settings.
_COUNTED: dict[str, Any] = {
    **dict.fromkeys(("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_n_updates"), int),
    **dict.fromkeys(("_episode_num", "_stats_window_size", "n_envs"), int),
    **dict.fromkeys(("ep_info_buffer", "ep_success_buffer"), deque | None),
    "_current_progress_remaining": int | float,
    "_gradient_norm": int | float | None,
    "_advantage_scale": AdvantageScale,
    "_gradient_moments": Tensor | None,
    **dict.fromkeys(("observation_space", "action_space"), Space),
}
# What impossible settings lead to in the constructors of Stable-Baselines3, torch and policies: their checks, their
# asserts, and attributes that text or None do not have.
_IMPOSSIBLE = (AssertionError, AttributeError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError)


class Contents(NamedTuple):
    """What a file of an agent holds."""

    name: str
    """Of the file, for errors."""
    data: dict[str, Any]
    """Attributes of the agent, and the entries that are none."""
    groups: dict[str, Any]
    """State dicts of policy and optimiser."""
    libraries: dict[str, str]
    """Versions it was written with."""
    order: list[str] | None = None
    """Names of the weights in the order of the optimiser, where that is known."""


class Transfer(NamedTuple):
    """What an agent took from another's file, by names of weights."""

    taken: list[str]
    """Set to what the other had."""
    other_shape: list[str]
    """Left as they were: the other's are of another shape."""
    missing: list[str]
    """Left as they were: the other has none."""
    frozen: list[str]
    """Not trained from now on."""


# What is meant by the parts of a policy, as the beginnings of names of weights.
PARTS = {
    "extractor": ("features_extractor.", "pi_features_extractor.", "vf_features_extractor."),
    "memory": ("memory_actor.", "memory_critic."),
    "heads": ("mlp_extractor.", "action_net.", "value_net.", "critic.", "log_std", "loss_terms."),
}

Model = TypeVar("Model", bound="SavedAlgorithm")


@dataclass(frozen=True)
class Resumed(Generic[Model]):
    """A run that can go on."""

    model: Model
    notes: dict[str, Any]
    """As given to `save_checkpoint`."""
    restarted: str | None
    """Why all environments start new episodes; None if the running ones go on."""


class SavedAlgorithm(OnPolicyAlgorithm):
    """The part of an on-policy algorithm for policies with memory that deals with files."""

    ranks = Ranks()
    """The processes that train together."""
    _rollout_start: TrainingPoint | None = None
    """Set while a rollout is collected, and where an exception or a callback broke one off until `learn` is over."""
    policy: Any
    _last_state: Any

    def check_settings(self) -> None:
        """Refuse settings that do not fit."""

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout_start", "tensorboard_log"]

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write the agent to a zip of JSON and safetensors, from which loading runs no code.

        At a path the file appears whole or not at all. The environment and the rollout are not part of it; settings and
        statistics of a `VecNormalize` around the environment are, for `load_normalizer`.

        Args:
            path: of the file (".zip" is appended if it has no suffix), or a binary file.
            exclude: attributes to leave out.
            include: attributes to keep that are left out otherwise.
        """
        self._write(path, exclude or (), include or (), {})  # type: ignore[arg-type]

    def _write(self, target: File, exclude: Iterable[str], include: Iterable[str], further: dict[str, Part]) -> None:
        optional = {*exclude, *self._excluded_save_params()} - set(include)
        groups = self.get_parameters()
        left_out = {*optional, *(name.split(".")[0] for name in groups), *_DERIVED}
        settings = {key: value for key, value in vars(self).items() if key not in left_out}
        if not _same_schedule(self.lr_schedule, self.learning_rate):
            # the one in use was set after the constructor made it from the learning rate
            settings["lr_schedule"] = self.lr_schedule
        if self.policy.extra_losses and "policy_kwargs" in settings:
            losses = self.policy.loss_terms.present(self.policy.extra_losses)
            settings["policy_kwargs"] = {**self.policy_kwargs, "extra_losses": losses}
        data: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        functions: list[str] = []
        if "policy_class" not in optional:
            data["policy_class"] = self._describe_policy_class()
        for name, value in settings.items():
            if name in _SCHEDULES and _is_function(value):
                value = _present_value(name, value, self._current_progress_remaining)
                functions.append(name)
            try:
                data[name] = describe(value, name, tensors, leave_out=name in _ESSENTIAL)
            except DescriptionError as error:
                warnings.warn(
                    f"{error}: it is not saved; load(path, custom_objects={{{name!r}: ...}}) can give it back",
                    stacklevel=4,
                )
        if "_last_state" not in optional and list(leaves(self._last_state)):
            data["_last_state"] = describe(pack(self._last_state), "_last_state", tensors)
        data |= {_FUNCTIONS: functions, _FROZEN: frozen_names(self.policy), _MASKED: self.policy.trained_with_masks}
        data[_LAYERS] = layers_in_words(self.policy)
        groups[OPTIMIZER] = name_weights(self.policy, groups[OPTIMIZER])
        parts = {"data": Part(data, tensors)} | {name: describe_part(group) for name, group in groups.items()}
        normalizer = self.get_vec_normalize_env()
        if normalizer is not None:
            parts[NORMALIZER] = describe_part(normalizer_state(normalizer))
        if isinstance(target, str | os.PathLike) and not Path(target).suffix:
            target = f"{os.fspath(target)}.zip"
        write_archive(target, "model", parts | further)

    def _describe_policy_class(self) -> Any:
        """Aliases are what a file may name; any other class has to be handed over."""
        for alias, kind in self.policy_aliases.items():
            if kind is self.policy_class:
                return alias
        return describe(self.policy_class, "policy_class", {}, leave_out=True)

    @classmethod
    def load(
        cls,
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read an agent that `save` wrote. Nothing in the file is executed.

        Args:
            path: of the file, with or without ".zip", or a binary file.
            env: to go on training in, with any number of copies.
            device: where to put the policy.
            custom_objects: attributes to take instead of the stored ones: functions as schedules, a policy class of
                your own as "policy_class", a features extractor of your own in "policy_kwargs". Entries of
                "policy_kwargs" that are not given stay as stored, except in zips of Stable-Baselines3.
                "policy.optimizer": None leaves the state of the optimiser unread.
            print_system_info: print the versions here and of the file.
            force_reset: start `env` anew; else the episodes at the time of saving go on, memory included.
            allow_pickle: read zips of Stable-Baselines3 too, which can hold any code and run it: those of
                `sb3_contrib.RecurrentPPO`, and of this class where Stable-Baselines3 wrote them. Only for files whose
                maker you trust. Episodes start anew.
            **kwargs: attributes to change, such as `learning_rate`, or `tensorboard_log`, which no file chooses.

        Raises:
            CheckpointError: the file is torn, foreign or wrong, or a class or function is missing; the message names
                the file, what is wrong and the remedy.
            ValueError: the spaces of `env` are others.
        """
        source, given = find_file(path), custom_objects or {}  # type: ignore[arg-type]
        if allow_pickle and _is_sb3_zip(source):
            contents = _read_sb3_zip(cls, source, given)
        else:
            contents = _read_contents(cls, read_archive(source, "model"), given)
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
            print("== SAVED MODEL SYSTEM INFO ==", *(f"{name}: {text}" for name, text in contents.libraries.items()))
        return cls._build(
            contents, env, device=device, given=given, force_reset=force_reset, arguments=kwargs, stacklevel=3
        )

    @classmethod
    def _build(
        cls,
        contents: Contents,
        env: GymEnv | None,
        *,
        device: torch.device | str,
        given: Mapping[str, Any],
        force_reset: bool,
        arguments: Mapping[str, Any],
        stacklevel: int,
    ) -> Self:
        """The agent that a file holds; the contents are used up. Warnings are of the caller `stacklevel` above."""
        data, name, chosen = contents.data, contents.name, {*given, *arguments}
        state, functions, frozen, masked, schedule, layers = (
            data.pop(key, None) for key in ("_last_state", _FUNCTIONS, _FROZEN, _MASKED, "lr_schedule", _LAYERS)
        )
        if "policy_kwargs" in arguments and arguments["policy_kwargs"] != data.get("policy_kwargs", {}):
            raise ValueError(
                "The specified policy kwargs do not equal the stored policy kwargs. Stored kwargs: "
                f"{data.get('policy_kwargs', {})}, specified kwargs: {arguments['policy_kwargs']}"
            )
        if "tensorboard_log" not in given:
            # a file must not choose where this machine writes
            data.pop("tensorboard_log", None)
        _warn_of_functions(data | {"lr_schedule": schedule}, functions, chosen, stacklevel + 1)
        if env is not None:
            env = cls._wrap_env(env, data.get("verbose", 0))
            check_for_correct_spaces(env, data["observation_space"], data["action_space"])
            if force_reset:
                data["_last_obs"] = state = None
            elif env.num_envs != data.get("n_envs"):
                raise CheckpointError(
                    f"{name}: the episodes of {data.get('n_envs')!r:.50} environments cannot go on in {env.num_envs}: "
                    "hand over as many, or start new episodes with load(path, env)"
                )
            data["n_envs"] = env.num_envs
        # episodes that go on are not to be seeded anew
        seeded = env if force_reset else None
        try:
            make: Any = cls
            model: Self = make(data["policy_class"], seeded, device=device, _init_setup_model=False)
            vars(model).update(data)
            vars(model).update(arguments)
            model.check_settings()
            model._setup_model()
        except _IMPOSSIBLE as error:
            raise CheckpointError(
                f"no model can be built from the settings in {name} and the arguments of load: "
                f"{type(error).__name__}: {error}"
            ) from error
        model.policy.trained_with_masks = bool(masked)
        model._take_parameters(contents, frozen, given.get(OPTIMIZER, contents) is not None, stacklevel + 1)
        if contents.libraries.get("torch") == str(torch.__version__):
            # others may say the same in other words
            _warn_of_layers(layers, layers_in_words(model.policy), stacklevel + 1)
        if env is not None and seeded is None:
            model.set_env(env, force_reset=False)
        schedule = arguments.get("lr_schedule", schedule)
        if schedule is not None and ("lr_schedule" in chosen or "learning_rate" not in chosen):
            if not callable(schedule) and not isinstance(schedule, int | float):
                raise CheckpointError(f"{name}: lr_schedule is {schedule!r:.200}, neither a number nor a schedule")
            model.lr_schedule = FloatSchedule(schedule)
        if model.use_sde:
            model.policy.reset_noise()
        if state is not None and model._last_obs is not None:
            if not isinstance(state, Tensor) or state.shape[:1] != (model.n_envs,):
                raise CheckpointError(f"{name}: the memory state is not of {model.n_envs} environments; force_reset it")
            model._last_state = unpack(state.to(model.device), like=model.policy.initial_state(1))
        return model

    def _take_parameters(self, contents: Contents, frozen: Any, with_optimizer: bool, stacklevel: int) -> None:
        for group in self._get_torch_save_params()[0]:
            if group not in contents.groups:
                raise CheckpointError(f"{contents.name} holds no {group}.json; it is incomplete")
            if group != OPTIMIZER:
                set_weights(recursive_getattr(self, group), contents.groups[group], group, contents.name)
        freeze(self.policy, frozen, contents.name)
        # in the dtype of the weights
        self._last_state = self.policy.initial_state(self.n_envs)
        if with_optimizer:
            try:
                kept = fit_optimizer(self.policy, contents.groups[OPTIMIZER], contents.name, contents.order)
                self.policy.optimizer.load_state_dict(kept)
            except MisfitError as error:
                warnings.warn(
                    f"{contents.name}: the weights are loaded, the optimiser starts anew, for its state does not fit: "
                    f"{error}",
                    stacklevel=stacklevel,
                )

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Take the parameters of a saved agent, or those that `get_parameters` gave.

        Args:
            load_path_or_dict: path of a file that `save` wrote, or state dicts by name.
            exact_match: all parameters must be given and fit; else those given are set, and the optimiser starts anew,
                with a warning, where its state does not fit.
            device: not used; parameters stay where they are.

        Raises:
            CheckpointError: the file is torn, foreign or wrong.
            ValueError: the parameters do not fit.
        """
        name, given = "the parameters", load_path_or_dict
        if not isinstance(given, dict):
            archive = read_archive(find_file(given), "model")
            name, given = archive.name, _groups(archive)
            for group, tree in given.items():
                check_numbers(tree, group, name)
        given = dict(given)
        if OPTIMIZER in given:
            try:
                given[OPTIMIZER] = fit_optimizer(self.policy, given[OPTIMIZER], name)
            except MisfitError as error:
                if exact_match:
                    raise ValueError(
                        f"{name}: the state of the optimiser does not fit: {error}; exact_match=False takes the "
                        "weights, and the optimiser starts anew"
                    ) from error
                warnings.warn(f"{name}: the optimiser starts anew, for its state does not fit: {error}", stacklevel=2)
                self.policy.optimizer.state.clear()
                del given[OPTIMIZER]
        super().set_parameters(given, exact_match, device)

    def take_weights(
        self, path: str | Path | io.BufferedIOBase, parts: Iterable[str] = tuple(PARTS), freeze: Iterable[str] = ()
    ) -> Transfer:
        """Start from what another agent has learnt, as far as its weights fit by name and shape.

        Its observations and actions may be others: layers that depend on them then stay as they are. The optimiser and
        the counters stay too; with all parts come the running scales of advantages and gradients. Frozen parts stay
        frozen in files and in resumed runs.

        Args:
            path: of a file that `save` or `save_checkpoint` wrote; nothing in it is executed.
            parts: what to take: of "extractor", "memory" and "heads".
            freeze: what not to train from now on: of the same.

        Raises:
            CheckpointError: the file is torn, foreign or wrong.
            ValueError: a part is unknown, or nothing at all fits.
        """
        parts, freeze = tuple(parts), tuple(freeze)
        for name in (*parts, *freeze):
            if name not in PARTS:
                raise ValueError(f"{name!r} is no part of a policy that can be taken or frozen; parts are {[*PARTS]}")
        archive = read_archive(find_file(path), "model")  # type: ignore[arg-type]
        given = _groups(archive).get(POLICY)
        check_numbers(given, POLICY, archive.name)
        if not isinstance(given, dict):
            raise CheckpointError(f"{archive.name} holds no {POLICY}.json; it is incomplete")
        own = dict(self.policy.named_parameters())
        wanted = [name for name in own if name.startswith(_beginnings(parts))]
        missing = [name for name in wanted if not isinstance(given.get(name), Tensor)]
        other = [name for name in wanted if name not in missing and given[name].shape != own[name].shape]
        taken = [name for name in wanted if name not in (*missing, *other)]
        if not taken:
            raise ValueError(
                f"{archive.name} has nothing that fits {', '.join(parts)} of this policy: give it the same memory, "
                "width and layers"
            )
        with torch.no_grad():
            for name in taken:
                own[name].copy_(given[name])
        if {*parts} == {*PARTS}:
            # what is usual, without which the first rollouts on a task that is solved already would seem to be it
            stored = archive.parts["data"]
            for name in ("_advantage_scale", "_gradient_norm"):
                value = rebuild(stored.tree.get(name), name, stored.tensors)
                if value is not None and isinstance(value, _COUNTED[name]):
                    setattr(self, name, value)
        frozen = [name for name in own if freeze and name.startswith(_beginnings(freeze))]
        for name in frozen:
            own[name].requires_grad_(False)
        return Transfer(taken, other, missing, frozen)

    @property
    def checkpoint_step(self) -> int:
        """Environment steps of the run that `save_checkpoint` would write."""
        point = self._rollout_start
        return self.num_timesteps if point is None else int(point.attributes["num_timesteps"])

    def save_checkpoint(self, path: str | Path | io.BufferedIOBase, notes: Mapping[str, Any] | None = None) -> None:
        """Write the agent and its training run, for `resume`.

        Beside the agent, the file holds the states of the random generators of Python, NumPy and torch, of the vector
        wrappers (settings and running statistics, stacked frames), and what the running episodes follow from, if every
        environment is wrapped in `xlstm_rl.envs.Resumable`. Called while a rollout is collected, as callbacks do, or
        after an exception ended one, it writes the run as it was before that rollout: the run then goes on from there
        and repeats the steps since. Called after `learn` returned, it writes the present, also where a callback stopped
        training within a rollout: the resumed run then does what another `learn` would do. What callbacks keep is
        theirs: hand it over as notes, and give it back to them.

        Args:
            path: as for `save`; the file appears whole or not at all, and `load` reads the agent in it.
            notes: plain values (numbers, strings, arrays, lists and dicts of them) that belong to the run.
        """
        point = self._rollout_start or mark_point(self)
        state = read_training(env_of(self), point) | {"notes": dict(notes or {})}
        try:
            part = describe_part(state)
        except DescriptionError as error:
            warnings.warn(f"{error}: a resumed run will start new episodes", stacklevel=2)
            part = describe_part(state | {"episodes": None})
        present = {name: vars(self)[name] for name in point.attributes}
        vars(self).update(point.attributes)
        try:
            self._write(path, (), (), {TRAINING: part})  # type: ignore[arg-type]
        finally:
            vars(self).update(present)

    @classmethod
    def resume(
        cls, path: str | Path | io.BufferedIOBase, env: GymEnv, device: torch.device | str = "auto", **kwargs: Any
    ) -> Self:
        """Go on with a training run where `save_checkpoint` left it.

        On a CPU, with the same versions of the libraries, deterministic environments and as many copies of them,
        `model.learn(steps, reset_num_timesteps=False)` then does bit for bit what the run would have done. Where
        environments cannot be brought back, they start new episodes and a warning says why.

        Args:
            path: of the file, with or without ".zip", or a binary file.
            env: like that of the run, wrappers included; their settings and states are those of the file.
            device: where to put the policy.
            **kwargs: `custom_objects`, as for `load`; `tensorboard_log` among them, as no file chooses it.

        Raises:
            CheckpointError: the file is torn, foreign or wrong, holds no training run or is of another number of
                environments.
            ValueError: the spaces of `env` are others.
        """
        resumed = cls.resume_with_notes(path, env, device=device, **kwargs)
        if resumed.restarted is not None:
            warnings.warn(f"all environments start new episodes: {resumed.restarted}", stacklevel=2)
        return resumed.model

    @classmethod
    def resume_with_notes(
        cls,
        path: str | Path | io.BufferedIOBase,
        env: GymEnv,
        device: torch.device | str = "auto",
        *,
        custom_objects: Mapping[str, Any] | None = None,
        new_episodes: str | None = None,
    ) -> Resumed[Self]:
        """Like `resume`, with the notes of the checkpoint, and in place of the warning why new episodes start.

        `new_episodes` is a reason to start such in any case, with random numbers of this rank and not of the file.
        """
        archive = read_archive(find_file(path), "model")  # type: ignore[arg-type]
        if TRAINING not in archive.parts:
            raise CheckpointError(
                f"{archive.name} holds an agent without its training run: RecurrentPPO.load reads it, save_checkpoint "
                "writes files to resume from"
            )
        state, given = archive.value(TRAINING), custom_objects or {}
        contents = _read_contents(cls, archive, given)
        model = cls._build(contents, env, device=device, given=given, force_reset=False, arguments={}, stacklevel=4)
        try:
            notes = dict(state["notes"])
            kept = state if new_episodes is None else {**state, "episodes": None}
            restarted = restore_training(env_of(model), kept, model.device)
        except FaultyEnvironmentError:
            # says nothing about the file
            raise
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{archive.name}, {TRAINING}.json: {type(error).__name__}: {error}") from error
        if restarted is not None:
            model._last_obs = None
            # other episodes than those at the start of training, and than those of other ranks
            rank = model.ranks.rank
            other = None if model.seed is None else _other_seed(model.seed, model.num_timesteps) + rank * model.n_envs
            seed_envs(env_of(model), other)
            if new_episodes is not None and other is not None:
                torch.manual_seed(other)
        return Resumed(model, notes, restarted if new_episodes is None else new_episodes)


def load_normalizer(path: File, env: VecEnv) -> VecNormalize | None:
    """Wrap an environment in the `VecNormalize` that a saved agent was trained with; nothing in the file is run.

    Args:
        path: of the file of an agent, with or without ".zip", or a binary file.
        env: with the observation space that was normalised.

    Returns:
        The environment with the settings and statistics of the time of saving, which go on changing unless `training`
        is set to False; None if the agent had no such wrapper.

    Raises:
        CheckpointError: the file is torn, foreign or wrong, or the statistics do not fit the environment.
    """
    archive = read_archive(find_file(path), "model")
    if NORMALIZER not in archive.parts:
        return None
    try:
        return make_normalizer(archive.value(NORMALIZER), env)
    except ValueError as error:
        raise CheckpointError(f"{archive.name}, {NORMALIZER}.json: {error}") from error


def save_policy(policy: Any, target: File) -> None:
    """Write a policy; see `XLSTMPolicy.save`."""
    arguments = policy._get_constructor_parameters()
    arguments.pop("lr_schedule", None)
    arguments |= {_FROZEN: frozen_names(policy), _MASKED: policy.trained_with_masks}
    parts = {"data": describe_part(arguments, leave_out=True), POLICY: describe_part(policy.state_dict())}
    write_archive(target, "policy", parts)


def load_policy(
    cls: type[Policy], source: File, device: torch.device | str, custom_objects: Mapping[str, Any]
) -> Policy:
    """Read a policy; see `XLSTMPolicy.load`."""
    archive = read_archive(source, "policy")
    arguments = _rebuild_settings(archive, custom_objects, "custom_objects={{{top!r}: ...}}")
    frozen, masked = arguments.pop(_FROZEN, None), arguments.pop(_MASKED, False)
    try:
        policy = cls(**arguments, lr_schedule=ConstantSchedule(0.0))
    except _IMPOSSIBLE as error:
        raise CheckpointError(
            f"no {cls.__name__} can be built from the settings in {archive.name}: {type(error).__name__}: {error}"
        ) from error
    set_weights(policy, archive.value(POLICY), POLICY, archive.name)
    freeze(policy, frozen, archive.name)
    policy.trained_with_masks = bool(masked)  # type: ignore[assignment]
    return policy.to(get_device(device))


def find_file(source: File) -> File:
    """The file itself, or the one with ".zip" appended where only that exists."""
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
        with_suffix = f"{os.fspath(source)}.zip"
        return with_suffix if os.path.isfile(with_suffix) else source
    return source


def _other_seed(seed: int, num_timesteps: int) -> int:
    """Far from the seeds of all other environments, those of evaluations too."""
    return int(np.random.SeedSequence((seed, num_timesteps)).generate_state(1)[0]) // 2


# Settings.


def _same_schedule(schedule: Any, learning_rate: Any) -> bool:
    """Whether the schedule is the one that Stable-Baselines3 makes of the learning rate."""
    inner, made = schedule, FloatSchedule(learning_rate)
    while isinstance(inner, FloatSchedule):
        inner = inner.value_schedule
    if _is_function(inner):
        return inner is made.value_schedule
    return not _is_function(made) and describe(inner, "", {}) == describe(made.value_schedule, "", {})


def _is_function(value: Any) -> bool:
    inner = value.value_schedule if isinstance(value, FloatSchedule) else value
    return callable(inner) and type(inner) not in (ConstantSchedule, LinearSchedule, FloatSchedule, LateSchedule)


def _present_value(name: str, function: Any, progress: float) -> float:
    present = float(function(progress))
    warnings.warn(
        f"{name} is a function, which a safe file cannot keep: its present value {present:g} is saved in its place; "
        f"custom_objects={{{name!r}: function}} of load and resume restores it, and a LinearSchedule of "
        "Stable-Baselines3 would be kept",
        stacklevel=5,
    )
    return present


def _warn_of_functions(data: Mapping[str, Any], names: Any, given: Collection[str], stacklevel: int) -> None:
    """Say which settings were functions when the agent was saved and are constants now."""
    for name in names if isinstance(names, list) else []:
        if name in _SCHEDULES and data.get(name) is not None and name not in given:
            warnings.warn(
                f"{name} was a function when the agent was saved and is the constant {data[name]} now: to train on, "
                f"hand it over as custom_objects={{{name!r}: function}}, which load and resume take",
                stacklevel=stacklevel,
            )


def _warn_of_layers(before: Any, now: Mapping[str, str], stacklevel: int) -> None:
    """Say which layers were changed after the agent was made, as no file holds that."""
    before = before if isinstance(before, dict) else now
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        one = changed[-1]
        warnings.warn(
            "layers were changed after the agent was made, and here they are as its settings build them: "
            f"{changed!r:.200} (the last was {before.get(one)!r:.100} and is {now.get(one)!r:.100}); change them "
            "likewise to train on",
            stacklevel=stacklevel,
        )


def _beginnings(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(beginning for part in parts for beginning in PARTS[part])


def _groups(archive: Archive) -> dict[str, Any]:
    """The state dicts in a file by name."""
    return {name: archive.value(name) for name in archive.parts if name not in ("data", TRAINING, NORMALIZER)}


def _read_contents(cls: type[SavedAlgorithm], archive: Archive, custom_objects: Mapping[str, Any]) -> Contents:
    """What the file of an agent holds, nothing of it executed."""
    data = _rebuild_settings(archive, custom_objects, "load(path, custom_objects={{{top!r}: {what}}})")
    data.pop(OPTIMIZER, None)
    for name, value in data.items():
        if name in custom_objects:
            continue
        if name in _BUILT or _is_code(inspect.getattr_static(cls, name, None)):
            raise CheckpointError(f"{archive.name}: data.json sets {name!r}, which is no setting; not loaded")
        if name in _COUNTED and (not isinstance(value, _COUNTED[name]) or value is True):
            raise CheckpointError(f"{archive.name}: {name} is {value!r:.200}, not {_COUNTED[name]}")
    for name in ("observation_space", "action_space", "policy_class"):
        if name not in data:
            raise CheckpointError(f"{archive.name} holds no {name}: load(path, custom_objects={{{name!r}: ...}})")
    policy = data["policy_class"]
    if isinstance(policy, str):
        if policy not in cls.policy_aliases:
            raise CheckpointError(
                f"{archive.name} names the policy {policy!r:.200}, known are {sorted(cls.policy_aliases)}; hand the "
                "class over: load(path, custom_objects={'policy_class': YourPolicy})"
            )
        data["policy_class"] = cls.policy_aliases[policy]
    return Contents(archive.name, data, _groups(archive), archive.libraries)


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
    if archive.version < 3:
        _keep_former_memory(settings.get("policy_kwargs", settings), str(settings.get("policy_class", "")))
    return settings


def _keep_former_memory(arguments: Any, policy: str) -> None:
    """Say in the arguments of a policy what was the default of "xlstm" when its file was written: the paper's."""
    if isinstance(arguments, dict) and arguments.get("memory", "xlstm") == "xlstm" and "Lstm" not in policy:
        given = arguments.get("memory_kwargs")
        arguments["memory_kwargs"] = {"defaults": "paper", **(given if isinstance(given, Mapping) else {})}


# Zips of Stable-Baselines3, which are pickles: only read where the caller says that they are trusted.

_SAME_AS: dict[type, str] = {
    RecurrentActorCriticPolicy: "MlpLstmPolicy",
    RecurrentActorCriticCnnPolicy: "CnnLstmPolicy",
    RecurrentMultiInputActorCriticPolicy: "MultiInputLstmPolicy",
}
_RENAMED = {"lstm_actor.": "memory_actor.rnn.", "lstm_critic.": "memory_critic.rnn."}


def _is_sb3_zip(source: File) -> bool:
    try:
        with zipfile.ZipFile(source) as file:
            return {"data", "policy.pth"} <= set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_sb3_zip(cls: type[SavedAlgorithm], source: File, custom_objects: Mapping[str, Any]) -> Contents:
    """What an agent of ours, or a `sb3_contrib.RecurrentPPO`, left in a zip of Stable-Baselines3. Runs code from it.

    Raises:
        CheckpointError: the zip is damaged, or the policy in it is none of ours or sb3-contrib's recurrent ones.
    """
    name = str(getattr(source, "name", source))
    warnings.warn(
        f"{name} is a zip of Stable-Baselines3: loading it runs the code pickled in it; save() writes a file that "
        "does not",
        stacklevel=3,
    )
    try:
        data, loaded, _ = load_from_zip_file(source, custom_objects=dict(custom_objects), device="cpu")  # type: ignore[arg-type]
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, pickle.PickleError) as error:
        raise CheckpointError(f"{name} cannot be unpickled: {type(error).__name__}: {error}") from error
    groups: Any = loaded
    if not data or not groups or "policy_class" not in data:
        raise CheckpointError(f"{name} holds no agent with its policy")
    policy = data["policy_class"]
    policy = _SAME_AS.get(policy, policy) if isinstance(policy, type) else policy
    policy = cls.policy_aliases.get(policy, policy) if isinstance(policy, str) else policy
    if not isinstance(policy, type) or not issubclass(policy, tuple(cls.policy_aliases.values())):
        raise CheckpointError(
            f"{name} holds an agent with the policy {policy!r:.200}, which has no memory core; loaded can be agents of "
            f"xlstm_rl and of sb3_contrib.RecurrentPPO with {', '.join(kind.__name__ for kind in _SAME_AS)}"
        )
    buffer = ("rollout_buffer_class", "rollout_buffer_kwargs")
    settings = {*inspect.signature(cls.__init__).parameters, *_COUNTED} - {"self", "policy", "env", "device", *buffer}
    kept = {key: value for key, value in data.items() if key in settings or key in custom_objects}
    kept["policy_class"] = policy
    weights = {_renamed(key): value for key, value in groups[POLICY].items()}
    return Contents(name, kept, {**groups, POLICY: weights}, {}, order=list(weights))


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
