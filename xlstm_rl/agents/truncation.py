"""What a time limit cut off: the value of the observation that an episode would have gone on from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.utils import obs_as_tensor

from xlstm_rl.agents.actor_critic import MemoryActorCritic, PolicyState
from xlstm_rl.agents.observations import map_obs
from xlstm_rl.memory import take


class Truncation(NamedTuple):
    """Episodes cut by a time limit in one step."""

    mask: np.ndarray
    """bool [n_envs]"""
    values: np.ndarray
    """[n_envs], value of the final observation where cut."""


def value_of_cut_episodes(
    policy: MemoryActorCritic, dones: np.ndarray, infos: list[dict[str, Any]], state: PolicyState
) -> Truncation:
    """Which episodes a time limit cut in a step, and the value of where they were cut.

    Args:
        policy: values the final observations.
        dones: bool [n_envs], an episode ended.
        infos: of the step, one per environment, as Stable-Baselines3 fills them.
        state: memory state after the observation acted on, leaves [n_envs, ...].
    """
    cut, values = np.zeros(len(dones), bool), np.zeros(len(dones), np.float32)
    for row in np.flatnonzero(dones):
        cut[row] = infos[row].get("TimeLimit.truncated", False) and "terminal_observation" in infos[row]
    if cut.any():
        rows = np.flatnonzero(cut)
        final = [infos[row]["terminal_observation"] for row in rows]
        stacked = map_obs(lambda *parts: np.stack(parts), *final)
        with torch.inference_mode():
            # the state that saw the episode, and no reset: the final observation belongs to it
            seen = take(state, torch.as_tensor(rows, device=policy.device))
            no_reset = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)
            values[rows] = policy.value(obs_as_tensor(stacked, policy.device), seen, no_reset).cpu().numpy()
    return Truncation(cut, values)
