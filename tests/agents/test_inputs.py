"""Previous action, reward and start flag reach rollout, training, predict and evaluation alike."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from tests.agents.masked_env import MaskedEpisodes
from tests.agents.recomputation import assert_recomputed
from tests.agents.small_agents import SMALL, agent, assert_same
from tests.agents.spaces_for_tests import ACTIONS, RandomEpisodes
from xlstm_rl import MemoryInputs
from xlstm_rl.agents import MultiInputXLSTMPolicy, RecurrentPPO, evaluate

POLICY = "MultiInputXLSTMPolicy"


def inputs_env(observation: str = "vector", action: str = "discrete", n_envs: int = 3) -> VecEnv:
    kwargs = {"observation": observation, "action": action}
    return make_vec_env(RandomEpisodes, n_envs, seed=0, env_kwargs=kwargs, wrapper_class=MemoryInputs)


def collected(env: VecEnv, **kwargs: Any) -> RecurrentPPO:
    """A model that collected two rollouts and never updated."""
    model = agent(env=env, policy=POLICY, n_steps=40, batch_size=48, seq_len=16, **kwargs)
    model.train = lambda: None  # type: ignore[method-assign]
    return model.learn(80 * env.num_envs)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", ["vector", "discrete", "image", "dict with image"])
def test_log_probabilities_and_values_are_recomputed(observation: str, action: str) -> None:
    # a convolution rounds otherwise for another number of images; in float64 the difference is 3e-15
    tolerance = 5e-5 if "image" in observation else 1e-5
    assert_recomputed(collected(inputs_env(observation, action)), value_tolerance=tolerance)


@pytest.mark.parametrize("critic_memory", ["shared", "separate", "none"])
@pytest.mark.parametrize("memory", ["lstm", "xlstm"])
def test_every_memory_is_recomputed(memory: str, critic_memory: str) -> None:
    kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 8}, "critic_memory": critic_memory}
    assert_recomputed(collected(inputs_env(), policy_kwargs=kwargs))


def test_rollout_holds_what_was_done_and_paid() -> None:
    buffer = collected(inputs_env()).rollout_buffer
    told, running = buffer.observations, ~buffer.ended[:-1]
    assert running.any() and not running.all()
    assert np.array_equal(told["previous_action"][1:][running], np.eye(3)[buffer.actions[:-1][running]])
    assert np.array_equal(told["previous_reward"][1:, :, 0][running], buffer.rewards[:-1][running])
    assert np.array_equal(told["episode_start"][:, :, 0], buffer.episode_starts)
    first = buffer.episode_starts
    assert not told["previous_action"][first].any() and not told["previous_reward"][first].any()


def test_predict_over_an_episode_equals_the_training_pass() -> None:
    model = agent(env=inputs_env(action="box"), policy=POLICY, steps=24)
    env = MemoryInputs(RandomEpisodes(action="box", longest=40))
    obs, _ = env.reset(seed=3)
    state, done, start = None, False, True
    seen: list[dict[str, Any]] = []
    actions: list[np.ndarray] = []
    while not done:
        action, state = model.predict(obs, state=state, episode_start=np.array([start]), deterministic=True)
        seen.append(obs)
        actions.append(action)
        obs, _, terminated, truncated, _ = env.step(action)
        done, start = terminated or truncated, False
    assert len(seen) > 10
    sequence = {key: torch.from_numpy(np.stack([one[key] for one in seen]))[None] for key in seen[0]}
    reset = torch.zeros(1, len(seen), dtype=torch.bool)
    reset[:, 0] = True
    taken = torch.from_numpy(np.stack(actions))[None]
    with torch.no_grad():
        result = model.policy.evaluate_sequence(sequence, taken, model.policy.initial_state(1), reset)
        highest = -(model.policy.log_std + 0.5 * np.log(2 * np.pi)).sum()
    # a Gaussian is highest at its mean, which is the deterministic action
    assert torch.allclose(result.log_prob, highest.expand_as(result.log_prob), atol=1e-5)


def test_reward_is_told_as_the_environment_pays_it() -> None:
    env = VecNormalize(inputs_env(), norm_obs=False, norm_reward=True)
    model = collected(env)
    buffer, running = model.rollout_buffer, ~model.rollout_buffer.ended[:-1]
    told = buffer.observations["previous_reward"][1:, :, 0][running]
    assert not np.allclose(told, buffer.rewards[:-1][running])
    assert len(evaluate(model, VecNormalize(inputs_env(), training=False, norm_reward=False), 3).returns) == 3


@pytest.mark.filterwarnings("ignore:predict got no action_masks")
def test_masks_and_checkpoints_go_with_it(tmp_path: Path) -> None:
    model = agent(env=make_vec_env(MaskedEpisodes, 2, wrapper_class=MemoryInputs), policy=POLICY, steps=32)
    assert model.rollout_buffer.action_masks is not None
    model.save(tmp_path / "model")
    assert_same(model, RecurrentPPO.load(tmp_path / "model", device="cpu"))


def test_sb3_contrib_gets_the_inputs_too() -> None:
    model = sb3_contrib.RecurrentPPO(
        MultiInputXLSTMPolicy, inputs_env(), n_steps=8, batch_size=12, n_epochs=1, policy_kwargs=SMALL, device="cpu"
    )
    assert model.learn(48).num_timesteps == 48
    evaluate_policy(model, inputs_env(), 3)


class Bandit(gym.Env[np.ndarray, Any]):
    """Eight pulls of two arms, one of which pays 1; the observation says nothing, so the rewards have to."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.good, self.time = int(self.np_random.integers(2)), 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> Any:
        self.time += 1
        return np.zeros(1, np.float32), float(action == self.good), self.time == 8, False, {}


def bandit_return(inputs: list[str] | None) -> float:
    """Mean return after training, of at most 7.5."""
    wrapper: dict[str, Any] = {"wrapper_class": MemoryInputs, "wrapper_kwargs": {"inputs": inputs}} if inputs else {}
    model = RecurrentPPO(
        POLICY if inputs else "MlpXLSTMPolicy",
        make_vec_env(Bandit, 8, seed=0, **wrapper),
        learning_rate=5e-3,
        n_steps=64,
        batch_size=256,
        n_epochs=8,
        policy_kwargs={"memory_kwargs": {"hidden_size": 16, "num_heads": 2, "blocks": "m"}, "net_arch": []},
        seed=0,
        device="cpu",
    )
    model.learn(8000)
    return float(evaluate(model, make_vec_env(Bandit, 8, seed=1, **wrapper), 200, seed=2).returns.mean())


def test_bandit_is_solved_by_previous_action_and_reward() -> None:
    # all but the first pull, which is a coin flip
    assert bandit_return(["action", "reward"]) > 7.2


def test_bandit_is_not_solved_without() -> None:
    # half of the pulls; the mean of 200 such episodes is beyond 5 once in 10 000
    assert bandit_return(None) < 5
