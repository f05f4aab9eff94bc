"""PPO with two LSTMs in one file, in the manner of CleanRL, written anew: the LSTMs are called once per time step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.peers.setting import BATCH, EPOCHS, LEARNING_RATE, N_ENVS, N_STEPS, Contender, head, vector_env

GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
State = list[tuple[Tensor, Tensor]]


class Agent(nn.Module):
    """Actor and critic with a memory each."""

    def __init__(self, inputs: int, actions: int, width: int) -> None:
        super().__init__()
        self.memories = nn.ModuleList(nn.LSTM(inputs, width) for _ in range(2))
        self.actor, self.critic = head(width, actions), head(width, 1)
        self.width = width

    def empty(self) -> State:
        return [(torch.zeros(1, N_ENVS, self.width), torch.zeros(1, N_ENVS, self.width)) for _ in self.memories]

    def forward(self, obs: Tensor, state: State, done: Tensor) -> tuple[Categorical, Tensor, State]:
        """obs [T, B, n], done [T, B] -> distribution and values over T * B, and the state."""
        outputs, new = [], []
        for memory, (h, c) in zip(self.memories, state, strict=True):
            steps = []
            for x, ended in zip(obs, done, strict=True):
                keep = (1.0 - ended).view(1, -1, 1)
                y, (h, c) = memory(x.unsqueeze(0), (keep * h, keep * c))
                steps.append(y)
            outputs.append(torch.cat(steps).flatten(0, 1))
            new.append((h, c))
        return Categorical(logits=self.actor(outputs[0])), self.critic(outputs[1]).squeeze(-1), new


class Rollout:
    """Steps of all environments, and the states before them."""

    def __init__(self, inputs: int) -> None:
        shape = (N_STEPS, N_ENVS)
        self.obs, self.action = torch.zeros(*shape, inputs), torch.zeros(shape, dtype=torch.long)
        self.log_prob, self.reward, self.done, self.value = (torch.zeros(shape) for _ in range(4))
        self.first: State = []


def make(task: str, width: int) -> Contender:
    """A rollout and an update, as scripts have them."""
    envs = vector_env(task)
    space: Any = envs.single_action_space
    agent = Agent(envs.single_observation_space.shape[0], int(space.n), width)  # type: ignore[index]
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    kept = Rollout(envs.single_observation_space.shape[0])  # type: ignore[index]
    obs, done, state = torch.as_tensor(envs.reset(seed=0)[0]), torch.zeros(N_ENVS), agent.empty()

    @torch.no_grad()
    def rollout() -> None:
        nonlocal obs, done, state
        kept.first = [(h.clone(), c.clone()) for h, c in state]
        for t in range(N_STEPS):
            kept.obs[t], kept.done[t] = obs, done
            chosen, kept.value[t], state = agent(obs[None], state, done[None])
            kept.action[t] = chosen.sample()
            kept.log_prob[t] = chosen.log_prob(kept.action[t])
            following, reward, terminated, truncated, _ = envs.step(kept.action[t].numpy())
            kept.reward[t], obs = torch.as_tensor(reward), torch.as_tensor(following)
            done = torch.as_tensor(np.logical_or(terminated, truncated).astype(np.float32))

    @torch.no_grad()
    def advantages() -> Tensor:
        found, last = torch.zeros(N_STEPS, N_ENVS), torch.zeros(N_ENVS)
        following, ended = agent(obs[None], state, done[None])[1], done
        for t in reversed(range(N_STEPS)):
            delta = kept.reward[t] + GAMMA * following * (1 - ended) - kept.value[t]
            found[t] = last = delta + GAMMA * LAMBDA * (1 - ended) * last
            following, ended = kept.value[t], kept.done[t]
        return found

    def evaluate(rows: Any) -> tuple[Categorical, Tensor]:
        first = [(h[:, rows], c[:, rows]) for h, c in kept.first]
        chosen, value, _ = agent(kept.obs[:, rows], first, kept.done[:, rows])
        return chosen, value

    def iterate() -> None:
        rollout()
        advantage = advantages()
        targets, order, count = advantage + kept.value, np.arange(N_ENVS), BATCH // N_STEPS
        for _ in range(EPOCHS):
            np.random.shuffle(order)
            for start in range(0, N_ENVS, count):
                rows = order[start : start + count]
                chosen, value = evaluate(rows)
                log_prob: Tensor = chosen.log_prob(kept.action[:, rows].flatten())  # type: ignore[no-untyped-call]
                ratio = (log_prob - kept.log_prob[:, rows].flatten()).exp()
                a = advantage[:, rows].flatten()
                a = (a - a.mean()) / (a.std() + 1e-8)
                policy = torch.max(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                loss = policy + 0.25 * (value - targets[:, rows].flatten()).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()

    @torch.no_grad()
    def error() -> float:
        rollout()
        chosen, _ = evaluate(slice(None))
        log_prob: Tensor = chosen.log_prob(kept.action.flatten())  # type: ignore[no-untyped-call]
        return float((log_prob - kept.log_prob.flatten()).abs().max())

    return Contender(iterate, error)
