"""rsl_rl's PPO with recurrent models. It has no categorical distribution: the sign of a Gaussian action is played."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from torch import Tensor

from benchmarks.peers.setting import BATCH, EPOCHS, LEARNING_RATE, N_ENVS, N_STEPS, Contender, vector_env

MINIBATCHES = N_ENVS * N_STEPS // BATCH


class Env(VecEnv):
    """A vector environment of gymnasium as rsl_rl wants it."""

    num_envs, num_actions, max_episode_length, device = N_ENVS, 1, 500, "cpu"
    cfg: dict[str, Any] = {}

    def __init__(self, task: str) -> None:
        self.envs = vector_env(task)
        self.episode_length_buf = torch.zeros(N_ENVS, dtype=torch.long)
        self.obs = self.pack(self.envs.reset(seed=0)[0])

    def pack(self, obs: Any) -> Any:
        return TensorDict({"policy": torch.as_tensor(obs)}, batch_size=[N_ENVS])

    def get_observations(self) -> Any:
        return self.obs

    def step(self, actions: Tensor) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.envs.step((actions[:, 0] > 0).long().numpy())
        self.obs = self.pack(obs)
        done, cut = torch.as_tensor(terminated | truncated), torch.as_tensor(truncated)
        return self.obs, torch.as_tensor(reward, dtype=torch.float32), done, {"time_outs": cut}


def make(task: str, width: int) -> Contender:
    """A runner."""

    def model(distribution: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "class_name": "RNNModel",
            "hidden_dims": [64, 64],
            "activation": "tanh",
            "rnn_type": "lstm",
            "rnn_hidden_dim": width,
            "rnn_num_layers": 1,
            "distribution_cfg": distribution,
        }

    settings = {
        "num_steps_per_env": N_STEPS,
        "save_interval": 10**9,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": model({"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"}),
        "critic": model(None),
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": EPOCHS,
            "num_mini_batches": MINIBATCHES,
            "learning_rate": LEARNING_RATE,
            "schedule": "fixed",
            "max_grad_norm": 0.5,
            "value_loss_coef": 0.5,
            "entropy_coef": 0.0,
            "use_clipped_value_loss": False,
        },
    }
    with contextlib.redirect_stdout(io.StringIO()):
        runner = OnPolicyRunner(Env(task), settings, log_dir=None, device="cpu")
    algorithm = runner.alg

    def iterate() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(1)

    def error() -> float:
        update, found = algorithm.update, []

        def look() -> dict[str, float]:
            found.append(_error(algorithm))
            algorithm.storage.clear()
            return {"value": 0.0}

        algorithm.update = look
        iterate()
        algorithm.update = update
        return found[0]

    return Contender(iterate, error)


@torch.no_grad()
def _error(algorithm: Any) -> float:
    worst = 0.0
    for batch in algorithm.storage.recurrent_mini_batch_generator(MINIBATCHES, 1):
        state = batch.hidden_states[0]
        algorithm.actor(batch.observations, masks=batch.masks, hidden_state=state, stochastic_output=True)
        log_prob = algorithm.actor.get_output_log_prob(batch.actions)
        worst = max(worst, float((log_prob - batch.old_actions_log_prob.squeeze(-1)).abs().max()))
    return worst
