"""What training recomputes of a rollout."""

import torch

from xlstm_rl.agents import Evaluation, RecurrentPPO, RolloutChunks


def recompute(model: RecurrentPPO) -> tuple[RolloutChunks, Evaluation]:
    """The chunks of the rollout, and what the policy makes of them."""
    chunks = model.rollout_buffer.chunks(torch.from_numpy(model.rollout_buffer.advantages.copy()))
    with torch.no_grad():
        return chunks, model.policy.evaluate_sequence(
            chunks.observations, chunks.actions, chunks.state, chunks.episode_starts, chunks.action_masks
        )


def assert_recomputed(model: RecurrentPPO, value_tolerance: float = 1e-5) -> None:
    """Assert that training sees the log-probabilities and values of the rollout."""
    chunks, result = recompute(model)
    assert chunks.episode_starts[:, 1:].any(), "the case must have episode starts inside chunks"
    assert (result.log_prob - chunks.old_log_prob).exp().sub(1).abs().max() < 1e-5
    assert (result.values - chunks.old_values).abs().max() < value_tolerance
