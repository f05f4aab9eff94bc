"""NaN, infinity and lost episodes in a rollout: named with their place, and kept from the weights."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from xlstm_rl.agents.observations import entries, map_obs, rows_of

# In the info of a step that did not happen, because the environment was lost or only reset in it; tells why.
SKIPPED = "skipped_step"


def check_step(env: VecEnv, obs: Any, rewards: np.ndarray, infos: Sequence[dict[str, Any]], place: str) -> None:
    """Refuse what the environments answered if there is NaN or infinity in it.

    Args:
        env: that answered.
        obs: [n_envs, ...] or a dict of those.
        rewards: [n_envs].
        infos: of the step; final observations are checked too.
        place: where this happens, for the message.

    Raises:
        FloatingPointError: names the quantity, the environment and the step.
    """
    if not (_is_finite(rewards) and _is_finite(obs)):
        normalizer = unwrap_vec_normalize(env)
        if normalizer is not None:
            # of a single NaN, normalising makes one everywhere
            _check_rows(normalizer.get_original_reward(), "reward", place)
            _check_rows(normalizer.get_original_obs(), "observation", place)
        _check_rows(rewards, "reward", place)
        _check_rows(obs, "observation", place)
    for env_index, info in enumerate(infos):
        if "terminal_observation" in info:
            _check_one(info["terminal_observation"], f"final observation of environment {env_index}", place)


def check_first_observations(env: VecEnv, obs: Any) -> None:
    """Refuse observations [n_envs, ...] before a rollout if there is NaN or infinity in them.

    Raises:
        FloatingPointError: names the environment and the entry.
    """
    if not _is_finite(obs):
        normalizer = unwrap_vec_normalize(env)
        if normalizer is not None:
            _check_rows(normalizer.get_original_obs(), "observation", "before the rollout")
        _check_rows(obs, "observation", "before the rollout")


def _is_finite(values: Any) -> bool:
    return all(part.dtype.kind != "f" or bool(np.isfinite(part).all()) for _, part in entries(values))


def _check_rows(values: Any, name: str, place: str) -> None:
    for env_index in range(rows_of(values)):
        row = map_obs(itemgetter(env_index), values)
        _check_one(row, f"{name} of environment {env_index}", place)


def _check_one(values: Any, name: str, place: str) -> None:
    for key, part in entries(values):
        array = np.asarray(part)
        if not _is_finite(array):
            entry = tuple(int(index) for index in np.argwhere(~np.isfinite(array))[0])
            where = ("" if key is None else f" under the key {key!r}") + (f" at index {list(entry)}" if entry else "")
            raise FloatingPointError(f"the {name} is {array[entry]}{where} {place}")


def rewards_without_skipped(rewards: np.ndarray, values: np.ndarray, infos: Sequence[dict[str, Any]]) -> np.ndarray:
    """Rewards [n_envs] under which steps that did not happen teach nothing.

    Where an environment was lost, its episode ends before the step. With the value [n_envs] of the observation acted
    on as reward, and nothing after it, the advantage of the step is 0, and the steps before are valued as if a time
    limit had cut the episode there.
    """
    skipped = skipped_steps(infos)
    if skipped.any():
        rewards = rewards.astype(values.dtype)
        rewards[skipped] = values[skipped]
    return rewards


def skipped_steps(infos: Sequence[dict[str, Any]]) -> np.ndarray:
    """Where the step did not happen, bool [n_envs]."""
    return np.array([SKIPPED in info for info in infos], bool)
