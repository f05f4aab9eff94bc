"""skrl's `PPO_RNN`, whose models are the user's: an LSTM each, run from episode end to episode end, as in examples."""

from __future__ import annotations

import logging
from typing import Any

import torch
from skrl import logger
from skrl.agents.torch.ppo import PPO_CFG, PPO_RNN
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer
from torch import Tensor, nn

from benchmarks.peers.setting import BATCH, EPOCHS, LEARNING_RATE, N_ENVS, N_STEPS, Contender, head, vector_env

MINIBATCHES = N_ENVS * N_STEPS // BATCH


class Recurrent(Model):
    """An LSTM and a network after it."""

    def build(self, width: int, outputs: int) -> None:
        self.width = width
        self.lstm = nn.LSTM(self.num_observations, width, batch_first=True)
        self.net = head(width, outputs)

    def get_specification(self) -> dict[str, Any]:
        size = (1, N_ENVS, self.width)
        return {"rnn": {"sequence_length": N_STEPS, "sizes": [size, size]}}

    def compute(self, inputs: dict[str, Any], role: str) -> tuple[Tensor, dict[str, Any]]:
        obs, (h, c) = inputs["observations"], inputs["rnn"]
        if not self.training:
            y, (h, c) = self.lstm(obs.unsqueeze(1), (h, c))
            return self.net(y.flatten(0, 1)), {"rnn": [h, c]}
        x = obs.view(-1, N_STEPS, obs.shape[-1])
        h, c = (s.view(1, -1, N_STEPS, self.width)[:, :, 0].contiguous() for s in (h, c))
        ended = (inputs["terminated"] | inputs["truncated"]).view(-1, N_STEPS)
        cuts = [0, *(ended[:, :-1].any(0).nonzero()[:, 0] + 1).tolist(), N_STEPS]
        pieces = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            y, (h, c) = self.lstm(x[:, start:end], (h, c))
            pieces.append(y)
            if end < N_STEPS:
                keep = (~ended[:, end - 1]).float().view(1, -1, 1)
                h, c = h * keep, c * keep
        return self.net(torch.cat(pieces, 1).flatten(0, 1)), {"rnn": [h, c]}


class Policy(CategoricalMixin, Recurrent):
    """The actor."""

    def __init__(self, env: Any, width: int) -> None:
        Model.__init__(self, observation_space=env.observation_space, action_space=env.action_space, device="cpu")
        CategoricalMixin.__init__(self)
        self.build(width, self.num_actions)


class Value(DeterministicMixin, Recurrent):
    """The critic."""

    def __init__(self, env: Any, width: int) -> None:
        Model.__init__(self, observation_space=env.observation_space, action_space=env.action_space, device="cpu")
        DeterministicMixin.__init__(self)
        self.build(width, 1)


def make(task: str, width: int) -> Contender:
    """An agent with its trainer."""
    logger.setLevel(logging.ERROR)
    env = wrap_env(vector_env(task))
    config = PPO_CFG(
        rollouts=N_STEPS,
        learning_epochs=EPOCHS,
        mini_batches=MINIBATCHES,
        learning_rate=LEARNING_RATE,
        grad_norm_clip=0.5,
        ratio_clip=0.2,
        value_clip=0.0,
        value_loss_scale=0.5,
    )
    config.experiment.write_interval = config.experiment.checkpoint_interval = 0
    agent = PPO_RNN(
        models={"policy": Policy(env, width), "value": Value(env, width)},
        memory=RandomMemory(memory_size=N_STEPS, num_envs=N_ENVS, device="cpu"),
        cfg=config,
        observation_space=env.observation_space,
        action_space=env.action_space,
        device="cpu",
    )
    settings = {"timesteps": N_STEPS, "headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
    trainer = SequentialTrainer(cfg=settings, env=env, agents=agent)

    def error() -> float:
        update, found = agent.update, []
        agent.update = lambda **_: found.append(_error(agent))
        trainer.train()
        agent.update = update
        return found[0]

    return Contender(trainer.train, error)


@torch.no_grad()
def _error(agent: Any) -> float:
    names = ["observations", "actions", "terminated", "truncated", "log_prob"]
    memory, rnn = agent.memory, agent._rnn_tensors_names
    batches = memory.sample_all(names=names, mini_batches=MINIBATCHES, sequence_length=N_STEPS)
    states = memory.sample_all(names=rnn, mini_batches=MINIBATCHES, sequence_length=N_STEPS)
    worst = 0.0
    for (obs, actions, terminated, truncated, log_prob), parts in zip(batches, states, strict=True):
        state = {name: part.transpose(0, 1) for name, part in zip(rnn, parts, strict=True)}
        inputs = {"observations": obs, "terminated": terminated, "truncated": truncated, "taken_actions": actions}
        inputs["rnn"] = [state["rnn_policy_0"], state["rnn_policy_1"]]
        _, outputs = agent.policy.act(inputs, role="policy")
        worst = max(worst, float((outputs["log_prob"] - log_prob).abs().max()))
    return worst
