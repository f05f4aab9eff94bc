"""One rank of a data parallel training, or one process that does what all ranks do together; see test_parallel.py."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.masked_env import MaskedEpisodes
from xlstm_rl import RecurrentPPO
from xlstm_rl.agents.actor_critic import StepResult
from xlstm_rl.memory import map_leaves, take


class Masked(MaskedEpisodes):
    """With a space, and so random observations, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = copy.deepcopy(self.observation_space)


SEED, ROLLOUTS, ENVS = 5, 3, 12
# What a case changes in the settings below.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"env": Masked},
    "truncation": {"env": "CartPole-v1", "limit": 9},
    "ragged": {"n_steps": 28, "seq_len": 16},
    "separate": {"policy_kwargs": {"critic_memory": "separate"}},
    "refresh": {"refresh_state": True, "ent_coef": 0.01},
    "target_kl": {"target_kl": 2e-4, "learning_rate": 3e-3},
    "mixed": {"mix_advantages": True, "n_steps": 28, "seq_len": 16},
    "gaussian": {"env": "Pendulum-v1", "limit": 20},
}


def make_model(case: str, n_envs: int, double: bool) -> RecurrentPPO:
    changes = dict(CASES[case])
    env, limit = changes.pop("env", "xlstm_rl/TMaze-v0"), changes.pop("limit", None)
    kwargs = {"corridor_length": 4} if env == "xlstm_rl/TMaze-v0" else {}
    wrapper = None if limit is None else (lambda inner: gym.wrappers.TimeLimit(inner.unwrapped, limit))
    envs = make_vec_env(env, n_envs, env_kwargs=kwargs, wrapper_class=wrapper)
    policy_kwargs = {
        "memory_kwargs": {"blocks": "ms", "hidden_size": 16},
        "net_arch": [16],
        **changes.pop("policy_kwargs", {}),
    }
    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 128, "n_epochs": 3, "seq_len": 16, "learning_rate": 1e-3}
    model = RecurrentPPO(
        "MlpXLSTMPolicy", envs, seed=SEED, device="cpu", policy_kwargs=policy_kwargs, **(settings | changes)
    )
    if double:
        model.policy.double()
        model._last_state = model.policy.initial_state(model.n_envs)
    return model


class AsRanks:
    """Makes one process draw the random numbers of the ranks, each for its own rows."""

    def __init__(self, model: RecurrentPPO, world_size: int) -> None:
        self.model, self.world_size, self.rows = model, world_size, model.n_envs // world_size
        self.states = []
        for rank in range(world_size):
            torch.manual_seed(int(np.random.SeedSequence((SEED, rank)).generate_state(1)[0]))
            self.states.append(torch.get_rng_state())
        self.act = model.policy.act
        model.policy.act = self.act_by_rank  # type: ignore[method-assign]
        vars(sys.modules["xlstm_rl.agents.ppo"])["minibatches"] = self.minibatches

    @contextlib.contextmanager
    def random_numbers(self, rank: int) -> Iterator[None]:
        torch.set_rng_state(self.states[rank])
        yield
        self.states[rank] = torch.get_rng_state()

    def act_by_rank(self, obs: Any, state: Any, reset: Any, **kwargs: Any) -> StepResult:
        steps, kwargs["reuse_state"] = [], False
        masks = kwargs.pop("action_masks", None)
        for rank in range(self.world_size):
            own = slice(rank * self.rows, (rank + 1) * self.rows)
            with self.random_numbers(rank):
                mask = None if masks is None else masks[own]
                steps.append(self.act(obs[own], take(state, own), reset[own], action_masks=mask, **kwargs))
        return map_leaves(lambda *leaf: torch.cat(leaf), *steps)

    def minibatches(self, chunks: Any, batch_size: int, group: Any) -> Iterator[Any]:
        total, rows = len(chunks.weights), torch.arange(len(chunks.weights))
        counted = float(chunks.weights.sum())
        number = min(max(1, round(counted / batch_size)), total // self.world_size)
        chunks = chunks._replace(weights=chunks.weights * (number / max(counted, 1.0)))
        parts = []
        for rank in range(self.world_size):
            own = rows[(rows % self.model.n_envs) // self.rows == rank]
            with self.random_numbers(rank):
                own = own[torch.randperm(len(own))]
            parts.append([own[len(own) * i // number : len(own) * (i + 1) // number] for i in range(number)])
        for index in range(number):
            yield take(chunks, torch.cat([part[index] for part in parts]))


def run(case: str, world_size: int, as_ranks: int, double: bool, target: Path) -> None:
    torch.set_num_threads(1)
    model = make_model(case, ENVS // world_size, double)
    if as_ranks > 1:
        AsRanks(model, as_ranks)
    model.learn(ROLLOUTS * model.n_steps * ENVS)
    result = {
        "weights": torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach(),
        "gradient_norm": model._gradient_norm,
        "advantage_scale": model._advantage_scale.mean_square,
        "steps": model.num_timesteps,
        "updates": model._n_updates,
        "explained_variance": model.logger.name_to_value["train/explained_variance"],
        "episodes": len(model.ep_info_buffer or ()),
    }
    torch.save(result, target)


def normalized(target: Path) -> None:
    """What running statistics become."""
    venv = VecNormalize(make_vec_env("CartPole-v1", 4))
    model = RecurrentPPO("MlpXLSTMPolicy", venv, n_steps=16, batch_size=64, n_epochs=1, seed=SEED, device="cpu")
    seen: list[Any] = []
    step = venv.venv.step_wait
    reset = venv.venv.reset

    def watched_step() -> Any:
        result = step()
        seen.append(result[0])
        return result

    def watched_reset() -> Any:
        seen.append(reset())
        return seen[-1]

    venv.venv.step_wait, venv.venv.reset = watched_step, watched_reset  # type: ignore[method-assign]
    model.learn(3 * 16 * 4 * model.ranks.world_size)
    running: Any = venv.obs_rms
    result = {"seen": np.concatenate(seen), "mean": running.mean, "var": running.var, "count": running.count}
    torch.save(result | {"returns": venv.ret_rms.mean}, target)


if __name__ == "__main__":
    kind, case, rank, world_size, as_ranks, double, folder = sys.argv[1:]
    if int(world_size) > 1 or kind == "world of one":
        store = dist.FileStore(f"{folder}/store", int(world_size))  # type: ignore[attr-defined]
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world_size), timeout=limit)
    path = Path(folder) / f"{kind}.{rank}.pt"
    normalized(path) if kind == "normalized" else run(case, int(world_size), int(as_ranks), double == "double", path)
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)
