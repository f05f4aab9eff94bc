"""A memory of your own: a leaky average of what was seen, in a class of two methods, that trains.

    python examples/own_memory.py

`check_memory_laws` tells whether a core carries and empties its state correctly; after `register_memory` its name goes
wherever the name of a built-in memory does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

from xlstm_rl import MemoryCore, RecurrentPPO, check_memory_laws, evaluate, register_memory
from xlstm_rl.memory import zeros_where


class LeakyState(NamedTuple):
    """Every leaf of a state starts with the batch dimension; all zeros is the empty state."""

    average: Tensor  # [B, hidden_size]


class LeakyMemory(MemoryCore):
    """h_t = decay * h_{t-1} + W x_t, with a learnt decay per unit."""

    def __init__(self, input_size: int, hidden_size: int = 32) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.inputs = nn.Linear(input_size, hidden_size)
        self.decay = nn.Parameter(torch.linspace(-2.0, 6.0, hidden_size))

    def initial_state(self, batch_size: int) -> LeakyState:
        """The empty memory of `batch_size` rows."""
        return LeakyState(self.inputs.weight.new_zeros(batch_size, self.output_size))

    def forward(self, x: Tensor, state: LeakyState, reset: Tensor | None = None) -> tuple[Tensor, LeakyState]:
        """x [B, T, input_size], reset bool [B, T] -> y [B, T, hidden_size] and the state after the last step."""
        decay, outputs = torch.sigmoid(self.decay), []
        for t, step in enumerate(self.inputs(x).unbind(1)):
            if reset is not None:
                state = zeros_where(reset[:, t], state)
            state = LeakyState(decay * state.average + step)
            outputs.append(state.average)
        return torch.tanh(torch.stack(outputs, dim=1)), state


register_memory("leaky", LeakyMemory)


def train(total_timesteps: int = 8_000, seed: int = 0) -> RecurrentPPO:
    """Learn to recall a cue after eight steps."""
    model = RecurrentPPO(
        "MlpXLSTMPolicy",
        make_vec_env("xlstm_rl:xlstm_rl/CueRecall-v0", 8, seed=seed),
        learning_rate=3e-3,
        n_steps=64,
        batch_size=256,
        n_epochs=8,
        ent_coef=0.01,
        policy_kwargs={"memory": "leaky", "memory_kwargs": {"hidden_size": 32}, "net_arch": []},
        seed=seed,
        device="cpu",
    )
    return model.learn(total_timesteps)


def main() -> None:
    """Check the laws, train, evaluate with and without the memory."""
    check_memory_laws(LeakyMemory(3).double())
    model = train()
    env = make_vec_env("xlstm_rl:xlstm_rl/CueRecall-v0", 8)
    for label, emptied in (("trained agent", False), ("same agent, memory emptied every step", True)):
        returns = evaluate(model, env, 100, empty_state_every_step=emptied, seed=1_000).returns
        print(f"{label}: mean return {returns.mean():.2f}")


if __name__ == "__main__":
    main()
