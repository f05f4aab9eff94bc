"""A loss of your own: the memory also learns to predict the next observation.

    python examples/own_loss.py

After `register_loss` the name of the term goes into `extra_losses` of any policy, with its weight and its settings.
"""

from __future__ import annotations

import torch
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

from xlstm_rl import LossTerm, RecurrentPPO, XLSTMPolicy, evaluate, register_loss
from xlstm_rl.agents import Evaluation, RolloutChunks


class NextObservation(LossTerm):
    """Squared error of the next observation, predicted from what the memory gives."""

    def __init__(self, policy: XLSTMPolicy, hidden: int = 64) -> None:
        super().__init__()
        assert policy.observation_space.shape is not None
        size = policy.observation_space.shape[0]
        width = policy.memory_actor.output_size
        self.predict = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def forward(self, chunk: RolloutChunks, computed: Evaluation) -> Tensor:
        """[B, T], 0 where the next observation is of another episode or another chunk."""
        error = (self.predict(computed.memory[:, :-1]) - chunk.observations[:, 1:]).square().mean(-1)
        error = error.masked_fill(chunk.episode_starts[:, 1:], 0.0)
        return torch.cat([error, error.new_zeros(len(error), 1)], dim=1)


register_loss("next-observation", NextObservation)


def train(total_timesteps: int = 20_000, seed: int = 0) -> RecurrentPPO:
    """Learn to recall a cue after eight steps."""
    model = RecurrentPPO(
        "MlpXLSTMPolicy",
        make_vec_env("xlstm_rl:xlstm_rl/CueRecall-v0", 8, seed=seed),
        learning_rate=2e-3,
        n_steps=64,
        batch_size=256,
        n_epochs=8,
        ent_coef=0.01,
        policy_kwargs={"extra_losses": {"next-observation": {"weight": 0.1}}},
        seed=seed,
        device="cpu",
    )
    return model.learn(total_timesteps)


def main() -> None:
    """Train and evaluate."""
    env = make_vec_env("xlstm_rl:xlstm_rl/CueRecall-v0", 8)
    print(f"mean return {evaluate(train(), env, 100, seed=1_000).mean_return:.2f}")


if __name__ == "__main__":
    main()
