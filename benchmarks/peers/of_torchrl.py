"""TorchRL: collector, GAE over whole rows and `ClipPPOLoss` in recurrent mode, two `LSTMModule`s."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import GymWrapper
from torchrl.modules import LSTMModule, ProbabilisticActor, ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from benchmarks.peers.setting import BATCH, EPOCHS, LEARNING_RATE, N_ENVS, N_STEPS, Contender, head, vector_env


def make(task: str, width: int) -> Contender:
    """A collector and an update."""
    warnings.filterwarnings("ignore", module="torchrl|tensordict")
    env = GymWrapper(vector_env(task), categorical_action_encoding=True)
    inputs, actions = env.observation_spec["observation"].shape[-1], int(env.action_spec.space.n)

    def memory(name: str) -> Any:
        state = [f"{name}_h", f"{name}_c"]
        following = [("next", part) for part in state]
        keys = {"in_keys": ["observation", *state], "out_keys": [f"{name}_y", *following]}
        return LSTMModule(inputs, width, recurrent_backend="pad", **keys)

    logits = TensorDictModule(head(width, actions), in_keys=["actor_y"], out_keys=["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(memory("actor"), logits),
        in_keys=["logits"],
        spec=env.action_spec,
        distribution_class=Categorical,
        return_log_prob=True,
    )
    critic = TensorDictSequential(memory("critic"), ValueOperator(head(width, 1), in_keys=["critic_y"]))
    collector = Collector(
        env,
        TensorDictSequential(actor, critic),
        frames_per_batch=N_ENVS * N_STEPS,
        total_frames=-1,
        device="cpu",
        auto_register_policy_transforms=True,
    )
    estimator = GAE(gamma=0.99, lmbda=0.95, value_network=critic, deactivate_vmap=True, average_gae=True)
    loss_module = ClipPPOLoss(
        actor, critic, clip_epsilon=0.2, entropy_coeff=0.0, critic_coeff=0.5, normalize_advantage=False
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=LEARNING_RATE)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(N_ENVS), sampler=SamplerWithoutReplacement(), batch_size=BATCH // N_STEPS
    )
    batches = iter(collector)

    def iterate() -> None:
        data = next(batches)
        with set_recurrent_mode(True):
            with torch.no_grad():
                data = estimator(data.exclude("state_value"))
            buffer.empty()
            buffer.extend(data)
            for _ in range(EPOCHS):
                for batch in buffer:
                    loss = loss_module(batch)
                    (loss["loss_objective"] + loss["loss_critic"]).backward()
                    nn.utils.clip_grad_norm_(loss_module.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()

    @torch.no_grad()
    def error() -> float:
        data = next(batches)
        state = [key for key in data.keys() if key.endswith(("_h", "_c"))]
        with set_recurrent_mode(True):
            again = actor.get_dist(data.select("observation", "is_init", *state, "action").clone())
        return float((again.log_prob(data["action"]) - data["action_log_prob"]).abs().max())

    return Contender(iterate, error)
