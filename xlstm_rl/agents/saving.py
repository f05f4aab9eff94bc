"""How an agent is saved, loaded and resumed, with the interface of Stable-Baselines3."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from xlstm_rl.agents.checkpoint import (
    find_file,
    load_model,
    load_parameters,
    print_system_info,
    read_contents,
    read_model,
    save_model,
)
from xlstm_rl.agents.sb3_zip import is_sb3_zip, read_sb3_zip
from xlstm_rl.agents.training_state import TrainingPoint, resume_model, save_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self


class SavedAlgorithm(OnPolicyAlgorithm):
    """The part of `RecurrentPPO` that deals with files."""

    _rollout_start: TrainingPoint | None = None
    """Set while a rollout is collected, and where an exception or a callback broke one off until `learn` is over."""

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout_start", "tensorboard_log"]

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write the agent to a zip of JSON and safetensors, from which loading runs no code.

        At a path the file appears whole or not at all. The environment and the rollout are not part of it.

        Args:
            path: of the file (".zip" is appended if it has no suffix), or a binary file.
            exclude: attributes to leave out.
            include: attributes to keep that are left out otherwise.
        """
        model: Any = self
        save_model(model, path, exclude or (), include or ())  # type: ignore[arg-type]

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
        model: Self = _load(
            cls,
            path,
            custom_objects or {},
            show_versions=print_system_info,
            allow_pickle=allow_pickle,
            env=env,
            device=device,
            force_reset=force_reset,
            arguments=kwargs,
        )
        return model

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Take the parameters of a saved agent, or those that `get_parameters` gave.

        Args:
            load_path_or_dict: path of a file that `save` wrote, or state dicts by name.
            exact_match: all parameters must be given and fit; else those given are set.
            device: not used; parameters stay where they are.
        """
        if not isinstance(load_path_or_dict, dict):
            load_path_or_dict = load_parameters(load_path_or_dict)
        super().set_parameters(load_path_or_dict, exact_match, device)

    @property
    def checkpoint_step(self) -> int:
        """Environment steps of the run that `save_checkpoint` would write."""
        point = self._rollout_start
        return self.num_timesteps if point is None else int(point.attributes["num_timesteps"])

    def save_checkpoint(self, path: str | Path | io.BufferedIOBase, notes: Mapping[str, Any] | None = None) -> None:
        """Write the agent and its training run, for `resume`.

        Beside the agent, the file holds the states of the random generators of Python, NumPy and torch, of the vector
        wrappers (running statistics, stacked frames), and what the running episodes follow from, if every environment
        is wrapped in `xlstm_rl.envs.Resumable`. Called while a rollout is collected, as callbacks do, or after an
        exception ended one, it writes the run as it was before that rollout: the run then goes on from there and
        repeats the steps since. Called after `learn` returned, it writes the present, also where a callback stopped
        training within a rollout: the resumed run then does what another `learn` would do.

        Args:
            path: as for `save`; the file appears whole or not at all, and `load` reads the agent in it.
            notes: plain values (numbers, strings, lists and dicts of them) that belong to the run.
        """
        model: Any = self
        save_checkpoint(model, path, self._rollout_start, notes or {})  # type: ignore[arg-type]

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
            env: like that of the run, wrappers included.
            device: where to put the policy.
            **kwargs: `custom_objects`, as for `load`; `tensorboard_log` among them, as no file chooses it.

        Raises:
            CheckpointError: the file is torn, foreign or wrong, holds no training run or is of another number of
                environments.
            ValueError: the spaces of `env` are others.
        """
        kind: Any = cls
        resumed = resume_model(kind, path, env, device=device, **kwargs)  # type: ignore[arg-type]
        if resumed.restarted is not None:
            warnings.warn(f"all environments start new episodes: {resumed.restarted}", stacklevel=2)
        model: Self = resumed.model
        return model


def _load(
    cls: Any, path: Any, custom_objects: dict[str, Any], *, show_versions: bool, allow_pickle: bool, **arguments: Any
) -> Any:
    path = find_file(path)
    if allow_pickle and is_sb3_zip(path):
        contents = read_sb3_zip(cls, path, custom_objects)
    else:
        contents = read_contents(cls, read_model(path), custom_objects)
    if show_versions:
        print_system_info(contents.libraries)
    return load_model(cls, contents, given=custom_objects, **arguments)
