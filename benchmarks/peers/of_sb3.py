"""sb3-contrib, Stable-Baselines3 without memory, and this library: the same glue for all three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.peers.setting import BATCH, EPOCHS, LEARNING_RATE, N_ENVS, N_STEPS, TASKS, Contender
from xlstm_rl import RecurrentPPO, general_settings

SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": BATCH, "n_epochs": EPOCHS, "learning_rate": LEARNING_RATE}
MACHINE: dict[str, Any] = {"seed": 0, "device": "cpu"}


def _contender(model: Any, error: Callable[[Any], float]) -> Contender:
    def measure() -> float:
        train, found = model.train, []
        # a rollout, and in place of its update a look at it
        model.train = lambda: found.append(error(model))
        iterate()
        model.train = train
        return float(found[0])

    def iterate() -> None:
        model.learn(N_ENVS * N_STEPS, reset_num_timesteps=model.num_timesteps == 0)

    return Contender(iterate, measure)


@torch.no_grad()
def _error_of_contrib(model: Any) -> float:
    worst = 0.0
    for batch in model.rollout_buffer.get(BATCH):
        actions = batch.actions.long().flatten()
        _, log_prob, _ = model.policy.evaluate_actions(
            batch.observations, actions, batch.lstm_states, batch.episode_starts
        )
        counted = batch.mask > 0.5
        worst = max(worst, float((log_prob - batch.old_log_prob)[counted].abs().max()))
    return worst


@torch.no_grad()
def _error_of_ours(model: Any) -> float:
    model.policy.set_training_mode(True)
    chunks = model.rollout_buffer.chunks(torch.zeros(N_STEPS, N_ENVS))
    again = model.policy.evaluate_sequence(chunks.observations, chunks.actions, chunks.state, chunks.episode_starts)
    return float((again.log_prob - chunks.old_log_prob).abs().max())


def contrib(task: str, width: int) -> Contender:
    """`sb3_contrib.RecurrentPPO`."""
    env = make_vec_env(TASKS[task], n_envs=N_ENVS, seed=0)
    policy = {"lstm_hidden_size": width}
    model = sb3_contrib.RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=policy, **SETTINGS, **MACHINE)
    return _contender(model, _error_of_contrib)


def no_memory(task: str, width: int) -> Contender:
    """`stable_baselines3.PPO`, which has nothing to recompute."""
    env = make_vec_env(TASKS[task], n_envs=N_ENVS, seed=0)
    return _contender(stable_baselines3.PPO("MlpPolicy", env, **SETTINGS, **MACHINE), lambda model: 0.0)


def ours(memory: str, critic_memory: str = "separate", **memory_kwargs: Any) -> Callable[[str, int], Contender]:
    """`xlstm_rl.RecurrentPPO` with a memory."""

    def make(task: str, width: int) -> Contender:
        policy = {
            "memory": memory,
            "memory_kwargs": {"hidden_size": width, **memory_kwargs},
            "critic_memory": critic_memory,
        }
        env = make_vec_env(TASKS[task], n_envs=N_ENVS, seed=0)
        return _contender(
            RecurrentPPO("MlpXLSTMPolicy", env, policy_kwargs=policy, **SETTINGS, **MACHINE), _error_of_ours
        )

    return make


def recommended(task: str, width: int) -> Contender:
    """`xlstm_rl.RecurrentPPO` with `general_settings()`, but for the sizes that all have in common."""
    settings = general_settings(policy_kwargs={"memory_kwargs": {"hidden_size": width}}, **SETTINGS)
    env = make_vec_env(TASKS[task], n_envs=N_ENVS, seed=0)
    return _contender(RecurrentPPO("MlpXLSTMPolicy", env, **settings, **MACHINE), _error_of_ours)
