"""What the memory does in training, in a few numbers per update: gates, size of the state, staleness."""

from __future__ import annotations

import torch

from xlstm_rl.agents.actor_critic import PolicyState
from xlstm_rl.agents.policy import XLSTMPolicy
from xlstm_rl.agents.rollout import ChunkedRolloutBuffer, RolloutChunks, first_steps
from xlstm_rl.kernels import KernelCall, recorded_calls
from xlstm_rl.memory import pack, take

# Of the rollout, at most so many steps are run once more: little beside the epochs of an update.
STEPS_FOR_GATES, CHUNKS_FOR_GATES = 8, 16
STEPS_FOR_STALENESS = 128


@torch.no_grad()
def memory_statistics(
    policy: XLSTMPolicy, buffer: ChunkedRolloutBuffer, chunks: RolloutChunks, last_state: PolicyState
) -> dict[str, float]:
    """Statistics of the actor's memory after an update, by the names under which they are logged.

    - "memory/state_rms": root mean square of the numbers in the states that chunks start from.
    - "memory/stale_state_error": how far the states kept from the rollout are from those that the updated weights
      come to from the same start, relative to their norm. `refresh_state` and shorter rollouts lower it.
    - "memory/block0_forget", "..._input" and so on for every xLSTM block: mean of the activated forget gate, and of the
      logarithm of the activated input gate.
    - "memory/block0_horizon": median over heads (units of an sLSTM) and steps of -1 / log(forget gate), the steps after
      which 1/e of a memory is left.

    Args:
        policy: after the update.
        buffer: the rollout.
        chunks: of it.
        last_state: memory state after its last step.

    Returns:
        Nothing for a memory without state.
    """
    if policy.memory_actor.state_size == 0:
        return {}
    policy.set_training_mode(False)
    sample = take(chunks, slice(CHUNKS_FOR_GATES))
    with recorded_calls() as calls:
        obs, starts = first_steps(sample, STEPS_FOR_GATES)
        policy.advance(obs, sample.state, starts)
    if policy.memory_critic is not None:
        # the critic's blocks run after as many of the actor's
        calls = calls[: len(calls) // 2]
    statistics = {
        f"memory/block{index}_{name}": value for index, call in enumerate(calls) for name, value in _gates(call).items()
    }
    statistics["memory/state_rms"] = float(pack(chunks.state.actor).square().mean().sqrt())
    statistics["memory/stale_state_error"] = _staleness(policy, buffer, chunks, last_state)
    return statistics


def _gates(call: KernelCall) -> dict[str, float]:
    log = call.log_gates()
    horizon = (-1.0 / log.forget.clamp(max=-1e-6)).median()
    return {"forget": float(log.forget.exp().mean()), "input": float(log.input.mean()), "horizon": float(horizon)}


def _staleness(
    policy: XLSTMPolicy, buffer: ChunkedRolloutBuffer, chunks: RolloutChunks, last_state: PolicyState
) -> float:
    """Relative error of the kept states at the second chunk start, else at the end of the rollout."""
    later = len(buffer.chunk_starts) > 1
    until = buffer.chunk_starts[1] if later else buffer.buffer_size
    kept = buffer.chunk_states[1] if later else last_state
    rows = slice(min(buffer.n_envs, max(1, STEPS_FOR_STALENESS // until)))
    sample = take(chunks, rows)
    obs, starts = first_steps(sample, until)
    fresh = policy.advance(obs, take(buffer.chunk_states[0], rows), starts)
    expected, found = pack(fresh.actor), pack(take(kept, rows).actor)
    return float(torch.dist(found, expected) / expected.norm().clamp(min=1e-8))
