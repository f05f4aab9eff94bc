"""Before the first update, training recomputes exactly what the rollout computed."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.recomputation import assert_recomputed, recompute
from tests.agents.spaces_for_tests import ACTIONS, OBSERVATIONS, RandomEpisodes, policy_name, vec_env
from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.agents.ppo import with_fresh_states

SMALL: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "recurrent_std": 1.0}


class WholeNumbers(RandomEpisodes):
    """Observes whole numbers, also as a part of a Dict."""

    def __init__(self, dtype: Any, in_a_dict: bool) -> None:
        super().__init__()
        numbers = spaces.Box(0, 9, (3,), dtype)
        self.observation_space = spaces.Dict({"numbers": numbers}) if in_a_dict else numbers


class StopAfterRollouts(BaseCallback):
    """Lets `rollouts` rollouts happen and stops before the next."""

    def __init__(self, rollouts: int) -> None:
        super().__init__()
        self.left = rollouts

    def _on_rollout_start(self) -> None:
        self.left -= 1

    def _on_step(self) -> bool:
        return self.left >= 0


def collected(observation: str = "vector", action: str = "discrete", rollouts: int = 2, **kwargs: Any) -> RecurrentPPO:
    """A model that collected rollouts (states carried from one to the next) and never updated."""
    policy_kwargs = {"memory_kwargs": {**SMALL, "blocks": "ms"}} | kwargs.pop("policy_kwargs", {})
    settings: dict[str, Any] = {"n_steps": 40, "batch_size": 48, "seq_len": 16, "seed": 0, "device": "cpu"} | kwargs
    env = vec_env(observation=observation, action=action)
    model = RecurrentPPO(policy_name(observation), env, policy_kwargs=policy_kwargs, **settings)
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(rollouts * 40 * env.num_envs)
    return model


@pytest.mark.parametrize("blocks", ["m", "s", "ms", "mms"])
@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
def test_log_probabilities_and_values_are_recomputed(blocks: str, critic_memory: str) -> None:
    kwargs = {"memory_kwargs": {**SMALL, "blocks": blocks}, "critic_memory": critic_memory}
    assert_recomputed(collected(policy_kwargs=kwargs))


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
def test_baseline_memories_are_recomputed(memory: str) -> None:
    assert_recomputed(collected(policy_kwargs={"memory": memory, "memory_kwargs": {"hidden_size": 8}}))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_space_is_recomputed(observation: str, action: str) -> None:
    assert_recomputed(collected(observation, action))


@pytest.mark.parametrize("squash", [False, True])
def test_gsde_is_recomputed(squash: bool) -> None:
    model = collected(action="box", use_sde=True, sde_sample_freq=4, policy_kwargs={"squash_output": squash})
    chunks, result = recompute(model)
    tolerance = 1e-3 if squash else 1e-5  # squashing is undone with a clamped arctanh
    assert (result.log_prob - chunks.old_log_prob).exp().sub(1).abs().max() < tolerance


@pytest.mark.parametrize("seq_len", [1, 7, 16, 39, 40])
def test_every_step_counts_once_whatever_the_sequence_length(seq_len: int) -> None:
    model = collected(seq_len=seq_len)
    assert_recomputed(model) if seq_len > 1 else None
    chunks, _ = recompute(model)
    assert chunks.weights.shape[1] == seq_len
    assert chunks.weights.sum() == 40 * 3
    counted = chunks.old_log_prob[chunks.weights > 0]
    assert np.allclose(np.sort(counted.numpy()), np.sort(model.rollout_buffer.log_probs.flatten()))


def test_refreshed_states_equal_the_rollouts_before_an_update() -> None:
    model = collected(seq_len=16)
    chunks, _ = recompute(model)
    refreshed = with_fresh_states(model.policy, model.rollout_buffer, chunks)
    for before, after in zip(_leaves(chunks.state), _leaves(refreshed.state), strict=True):
        assert torch.allclose(before, after, atol=1e-5)


def test_refreshed_states_follow_the_weights() -> None:
    model = collected(seq_len=16)
    chunks, _ = recompute(model)
    with torch.no_grad():
        model.policy.memory_actor.get_parameter("blocks.0.up.weight").mul_(2)
    refreshed = with_fresh_states(model.policy, model.rollout_buffer, chunks)
    later = slice(model.n_envs, None)
    difference = max(
        float((before[later] - after[later]).abs().max())
        for before, after in zip(_leaves(chunks.state), _leaves(refreshed.state), strict=True)
        if before.numel()
    )
    assert difference > 1e-3


def _leaves(state: Any) -> list[torch.Tensor]:
    from xlstm_rl.memory import leaves

    return list(leaves(state))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
@pytest.mark.parametrize("in_a_dict", [False, True])
def test_normalised_whole_numbers_are_recomputed(dtype: type, in_a_dict: bool) -> None:
    env = VecNormalize(make_vec_env(WholeNumbers, 3, seed=0, env_kwargs={"dtype": dtype, "in_a_dict": in_a_dict}))
    model = RecurrentPPO(
        "MultiInputXLSTMPolicy" if in_a_dict else "MlpXLSTMPolicy",
        env,
        n_steps=40,
        seq_len=10,
        policy_kwargs={"memory_kwargs": SMALL},
        seed=0,
        device="cpu",
    )
    model.train = lambda: None  # type: ignore[method-assign]
    model.learn(40 * 3)
    stored = model.rollout_buffer.observations
    stored = stored["numbers"] if in_a_dict else stored
    assert (stored % 1 != 0).any(), "the case must have normalised observations"
    assert_recomputed(model)
