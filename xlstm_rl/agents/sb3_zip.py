"""Agents in zips of Stable-Baselines3, which are pickles: only read where the caller says that they are trusted."""

from __future__ import annotations

import inspect
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from stable_baselines3.common.save_util import load_from_zip_file

from xlstm_rl.agents.archive import CheckpointError
from xlstm_rl.agents.checkpoint import Contents, File
from xlstm_rl.agents.lstm_policy import CnnLSTMPolicy, LSTMPolicy, MultiInputLSTMPolicy
from xlstm_rl.agents.policy import XLSTMPolicy

if TYPE_CHECKING:
    from xlstm_rl.agents.ppo import RecurrentPPO

_SAME_AS: dict[type, type[XLSTMPolicy]] = {
    RecurrentActorCriticPolicy: LSTMPolicy,
    RecurrentActorCriticCnnPolicy: CnnLSTMPolicy,
    RecurrentMultiInputActorCriticPolicy: MultiInputLSTMPolicy,
}
_RENAMED = {"lstm_actor.": "memory_actor.rnn.", "lstm_critic.": "memory_critic.rnn."}
# What an agent learnt and counted, beside its settings.
_COUNTED = (
    *("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_n_updates", "_current_progress_remaining"),
    *("ep_info_buffer", "ep_success_buffer", "_stats_window_size", "_episode_num", "n_envs"),
    *("_advantage_scale", "_gradient_norm", "observation_space", "action_space"),
)
_BUFFER = ("rollout_buffer_class", "rollout_buffer_kwargs")


def is_sb3_zip(source: File) -> bool:
    """Whether a file is a zip that Stable-Baselines3 wrote; nothing in it is executed."""
    try:
        with zipfile.ZipFile(source) as file:
            return {"data", "policy.pth"} <= set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_sb3_zip(cls: type[RecurrentPPO], source: File, custom_objects: Mapping[str, Any]) -> Contents:
    """Read an agent of ours, or a `sb3_contrib.RecurrentPPO`, from a zip of Stable-Baselines3. Runs code from it.

    Args:
        cls: the class to load into.
        source: path or binary file.
        custom_objects: attributes to take instead of the stored ones.

    Raises:
        CheckpointError: the zip is damaged, or the policy in it is none of ours or sb3-contrib's recurrent ones.
    """
    name = str(getattr(source, "name", source))
    warnings.warn(
        f"{name} is a zip of Stable-Baselines3: loading it runs the code pickled in it; save() writes a file that "
        "does not",
        stacklevel=4,
    )
    try:
        data, loaded, _ = load_from_zip_file(source, custom_objects=dict(custom_objects), device="cpu")  # type: ignore[arg-type]
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, pickle.PickleError) as error:
        raise CheckpointError(f"{name} cannot be unpickled: {type(error).__name__}: {error}") from error
    groups: Any = loaded
    if not data or not groups or "policy_class" not in data:
        raise CheckpointError(f"{name} holds no agent with its policy")
    policy = data["policy_class"]
    policy = cls.policy_aliases.get(policy, policy) if isinstance(policy, str) else policy
    if not isinstance(policy, type) or not (policy in _SAME_AS or issubclass(policy, XLSTMPolicy)):
        raise CheckpointError(
            f"{name} holds an agent with the policy {policy!r:.200}, which has no memory core; loaded can be agents of "
            f"xlstm_rl and of sb3_contrib.RecurrentPPO with {', '.join(kind.__name__ for kind in _SAME_AS)}"
        )
    settings = {*inspect.signature(cls.__init__).parameters, *_COUNTED} - {"self", "policy", "env", "device", *_BUFFER}
    kept = {key: value for key, value in data.items() if key in settings or key in custom_objects}
    kept["policy_class"] = _SAME_AS.get(policy, policy)
    weights = {_renamed(key): value for key, value in groups["policy"].items()}
    return Contents(
        name=name,
        libraries={},
        data=kept,
        functions=None,
        state=None,
        groups={**groups, "policy": weights},
        parameter_order=list(weights),
    )


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
