"""Recurrent PPO in one file, for those who want to own their loop: only the memory comes from the library.

python examples/single_file.py --env xlstm_rl/TMaze-v0 --steps 60000
"""

from __future__ import annotations

import argparse
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xlstm_rl.envs  # noqa: F401  registers the tasks
from xlstm_rl import make_memory
from xlstm_rl.memory import map_leaves, take

parser = argparse.ArgumentParser()
parser.add_argument("--env", default="xlstm_rl/TMaze-v0")
parser.add_argument("--steps", type=int, default=60_000)
parser.add_argument("--memory", default="xlstm")
parser.add_argument("--seed", type=int, default=0)
ENVS, ROLLOUT, CHUNK, EPOCHS, MINIBATCHES = 16, 128, 64, 4, 4
GAMMA, LAMBDA, CLIP, ENTROPY, RATE = 0.99, 0.95, 0.2, 0.01, 1e-3


class Agent(nn.Module):
    """Memory, then a linear actor and a linear critic."""

    def __init__(self, features: int, actions: int, memory: str) -> None:
        super().__init__()
        self.core = make_memory(memory, features)
        self.actor = nn.Linear(self.core.output_size, actions)
        self.critic = nn.Linear(self.core.output_size, 1)
        nn.init.zeros_(self.actor.weight)

    def step(self, x: Tensor, state: Any, start: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Observations [N, F] and episode starts [N] -> log-probabilities of all actions [N, A], values [N], state."""
        y, state = self.core.step(x, state, start)
        return F.log_softmax(self.actor(y), -1), self.critic(y).squeeze(-1), state

    def sequence(self, x: Tensor, state: Any, start: Tensor) -> tuple[Tensor, Tensor]:
        """Observations [B, T, F] and episode starts [B, T] -> [B, T, A] and [B, T]; all steps at once."""
        y, _ = self.core(x, state, start)
        return F.log_softmax(self.actor(y), -1), self.critic(y).squeeze(-1)


def of(log_probs: Tensor, actions: Tensor) -> Tensor:
    """The log-probabilities [...] of actions [...] among those of all, [..., A]."""
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the mean return of the last hundred episodes."""
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    # a new episode starts in the same step in which one ends, and its last observation is in the info
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.wrappers.FlattenObservation(gym.make(options.env)) for _ in range(ENVS)],
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    features, actions = envs.single_observation_space.shape[0], int(envs.single_action_space.n)  # type: ignore[index, attr-defined]
    agent = Agent(features, actions, options.memory)
    optimizer = torch.optim.Adam(agent.parameters(), RATE, eps=1e-5)
    obs, _ = envs.reset(seed=options.seed)
    start, state = torch.ones(ENVS, dtype=torch.bool), agent.core.initial_state(ENVS)
    running, returns = np.zeros(ENVS), deque[float](maxlen=100)

    for update in range(max(options.steps // (ENVS * ROLLOUT), 1)):
        steps: list[tuple[Tensor, ...]] = []
        states = []
        for t in range(ROLLOUT):
            if t % CHUNK == 0:
                # the memory is kept at the starts of chunks alone
                states.append(map_leaves(torch.clone, state))
            x = torch.as_tensor(obs, dtype=torch.float32)
            with torch.no_grad():
                log_probs, value, state = agent.step(x, state, start)
            action = log_probs.exp().multinomial(1).squeeze(1)
            obs, reward, terminated, truncated, info = envs.step(action.numpy())
            ended = terminated | truncated
            after = torch.zeros(ENVS)
            if truncated.any():
                # a time limit is no end of the task: what would have followed still counts
                last = np.stack([obs[i] if final is None else final for i, final in enumerate(info["final_obs"])])
                no_start = torch.zeros(ENVS, dtype=torch.bool)
                with torch.no_grad():
                    _, value_after, _ = agent.step(torch.as_tensor(last, dtype=torch.float32), state, no_start)
                after = value_after * torch.as_tensor(truncated & ~terminated)
            paid = torch.as_tensor(reward, dtype=torch.float32) + GAMMA * after
            steps.append((x, start, action, of(log_probs, action), value, paid, torch.as_tensor(ended)))
            running += reward
            returns.extend(running[ended])
            running[ended] = 0
            start = torch.as_tensor(ended)
        x, starts, action, log_prob, value, paid, ends = (torch.stack(part, 1) for part in zip(*steps, strict=True))

        with torch.no_grad():
            _, next_value, _ = agent.step(torch.as_tensor(obs, dtype=torch.float32), state, start)
        advantage, following = torch.zeros_like(value), torch.zeros(ENVS)
        for t in reversed(range(ROLLOUT)):
            goes_on = (~ends[:, t]).float()
            delta = paid[:, t] + GAMMA * next_value * goes_on - value[:, t]
            following = delta + GAMMA * LAMBDA * goes_on * following
            advantage[:, t], next_value = following, value[:, t]
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

        # [ENVS, ROLLOUT, ...] -> chunks [B, CHUNK, ...]; episodes start inside of them
        whole = (x, starts, action, log_prob, advantage, target)
        chunks = tuple(part.view(ENVS, -1, CHUNK, *part.shape[2:]).transpose(0, 1).flatten(0, 1) for part in whole)
        first = map_leaves(lambda *parts: torch.cat(parts), *states)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(chunks[0])).chunk(MINIBATCHES):
                x, starts, action, old, gain, aim = (part[rows] for part in chunks)
                log_probs, value = agent.sequence(x, take(first, rows), starts)
                ratio = (of(log_probs, action) - old).exp()
                loss = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
                entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
                loss = loss + 0.5 * F.mse_loss(value, aim) - ENTROPY * entropy
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        print(f"{(update + 1) * ENVS * ROLLOUT:>8,} steps, return of the last {len(returns)}: {np.mean(returns):.3f}")
    envs.close()
    return float(np.mean(returns))


if __name__ == "__main__":
    main()
