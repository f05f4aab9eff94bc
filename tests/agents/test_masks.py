"""A masked action is never taken, and training sees the masks of the rollout."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from tests.agents.masked_env import MASKABLE, MaskedEpisodes, chosen, random_mask
from tests.agents.recomputation import assert_recomputed, recompute
from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import RandomEpisodes, vec_env
from xlstm_rl.agents import MaskedEvalCallback, MaskedModel, RecurrentPPO, XLSTMPolicy, evaluate, evaluate_random
from xlstm_rl.agents.heads import check_masks, mask_parts, sample_allowed
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError

CRITICS = ("shared", "separate", "none")


def masked_env(action: str = "discrete", n_envs: int = 3, **kwargs: Any) -> VecEnv:
    return make_vec_env(MaskedEpisodes, n_envs=n_envs, seed=0, env_kwargs={"action": action, **kwargs})


def collected(env: VecEnv, **kwargs: Any) -> RecurrentPPO:
    """A model that collected two rollouts and never updated."""
    model = agent(env=env, n_steps=40, batch_size=48, seq_len=16, **kwargs)
    model.train = lambda: None  # type: ignore[method-assign]
    return model.learn(80 * env.num_envs)


# A masked action is never taken: the environments fail where it is.


@pytest.mark.parametrize("action", MASKABLE)
@pytest.mark.parametrize("memory", ["xlstm", "lstm"])
def test_training_takes_allowed_actions_only(memory: str, action: str) -> None:
    kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 8}}
    model = agent(env=masked_env(action), n_steps=32, batch_size=48, n_epochs=2, steps=192, policy_kwargs=kwargs)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())


def test_lstm_policy_takes_allowed_actions_only() -> None:
    settings: dict[str, Any] = {
        "n_steps": 16,
        "batch_size": 24,
        "n_epochs": 1,
        "policy_kwargs": {"lstm_hidden_size": 8},
    }
    # the environment refuses a forbidden action
    model = RecurrentPPO("MlpLstmPolicy", masked_env(), **settings).learn(96)
    assert model.num_timesteps == 96
    assert model.rollout_buffer.action_masks is not None


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("action", MASKABLE)
def test_evaluation_takes_allowed_actions_only(action: str, deterministic: bool) -> None:
    model = agent(env=masked_env(action))
    assert len(evaluate(model, masked_env(action), 20, deterministic=deterministic).returns) == 20
    assert len(evaluate(model, masked_env(action), 5, empty_state_every_step=True).returns) == 5


@pytest.mark.parametrize("action", MASKABLE)
def test_random_agent_takes_allowed_actions_only(action: str) -> None:
    assert len(evaluate_random(masked_env(action), 20, seed=0).returns) == 20


def test_masks_come_through_processes_and_normalisation() -> None:
    env = VecNormalize(SubprocVecEnv([partial(MaskedEpisodes, action="multi-discrete")] * 2))
    try:
        model = agent(env=env, steps=64)
        assert model.rollout_buffer.action_masks is not None
        assert not model.rollout_buffer.action_masks.all()
    finally:
        env.close()


def test_masker_wrapper_of_sb3_contrib_is_understood() -> None:
    def forbid_two(env: gym.Env[Any, Any]) -> np.ndarray:
        return np.array([1, 1, 0])

    env = make_vec_env(lambda: ActionMasker(RandomEpisodes(), forbid_two), n_envs=2)
    model = agent(env=env, steps=32)
    assert set(np.unique(model.rollout_buffer.actions)) == {0, 1}


SPACES = st.one_of(
    st.builds(spaces.Discrete, st.integers(1, 6)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1, max_size=4)),
    st.builds(spaces.MultiBinary, st.integers(1, 4)),
)


class OfSpace(gym.Env[Any, Any]):
    """Never played: lends its spaces."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space


@given(space=SPACES, seed=st.integers(0, 10_000), deterministic=st.booleans(), scale=st.sampled_from([1.0, 1e3, 1e6]))
def test_no_policy_predicts_or_samples_a_masked_action(
    space: spaces.Space[Any], seed: int, deterministic: bool, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    model = agent(env=OfSpace(space))
    with torch.no_grad():
        model.policy.action_net.get_parameter("bias").normal_(std=scale)
    masks = np.stack([random_mask(space, rng) for _ in range(5)])
    obs = rng.normal(size=(5, 3)).astype(np.float32)
    predicted, _ = model.predict(obs, deterministic=deterministic, action_masks=masks)
    step = model.policy.act(
        torch.from_numpy(obs),
        model.policy.initial_state(5),
        torch.ones(5, dtype=torch.bool),
        deterministic=deterministic,
        action_masks=torch.from_numpy(masks),
    )
    uniform = [sample_allowed(space, mask) for mask in masks]
    for actions in (predicted, step.actions.numpy(), uniform):
        for action, mask in zip(actions, masks, strict=True):
            assert mask[chosen(action, space)].all()
    assert step.log_prob.isfinite().all()


# Training sees what the rollout saw.


@pytest.mark.parametrize("critic_memory", CRITICS)
@pytest.mark.parametrize("action", MASKABLE)
def test_log_probabilities_and_values_are_recomputed(action: str, critic_memory: str) -> None:
    model = collected(masked_env(action), policy_kwargs={"critic_memory": critic_memory})
    assert model.rollout_buffer.action_masks is not None
    assert_recomputed(model)


@pytest.mark.parametrize("action", MASKABLE)
def test_masks_matter_to_log_probabilities(action: str) -> None:
    model = collected(masked_env(action))
    model.rollout_buffer.action_masks = None
    chunks, result = recompute(model)
    # over all actions the one taken is less probable
    assert (result.log_prob < chunks.old_log_prob + 1e-5).all()
    assert (result.log_prob - chunks.old_log_prob).mean() < -0.1


@pytest.mark.parametrize("action", MASKABLE)
def test_all_true_masks_change_nothing(action: str) -> None:
    model = collected(vec_env(action=action))
    chunks, unmasked = recompute(model)
    every = torch.ones(*chunks.weights.shape, sum(mask_parts(model.action_space)), dtype=torch.bool)
    with torch.no_grad():
        masked = model.policy.evaluate_sequence(
            chunks.observations, chunks.actions, chunks.state, chunks.episode_starts, every
        )
    assert torch.allclose(masked.log_prob, unmasked.log_prob, atol=1e-5)
    assert masked.entropy is not None and unmasked.entropy is not None
    assert torch.allclose(masked.entropy, unmasked.entropy, atol=1e-5)


@pytest.mark.parametrize("action", MASKABLE)
def test_single_choice_has_no_entropy_and_no_gradient(action: str) -> None:
    model = collected(masked_env(action))
    chunks, _ = recompute(model)
    parts = mask_parts(model.action_space)
    masks = torch.zeros(*chunks.weights.shape, sum(parts), dtype=torch.bool)
    masks[..., np.cumsum([0, *parts[:-1]])] = True
    result = model.policy.evaluate_sequence(
        chunks.observations, torch.zeros_like(chunks.actions), chunks.state, chunks.episode_starts, masks
    )
    assert result.entropy is not None
    assert result.log_prob.abs().max() == result.entropy.abs().max() == 0
    (result.log_prob + result.entropy).sum().backward()  # type: ignore[no-untyped-call]
    gradient = model.policy.action_net.get_parameter("weight").grad
    assert gradient is not None and not gradient.isnan().any() and not gradient.count_nonzero()


# Stable-Baselines3's evaluation.


def test_evaluation_of_stable_baselines3_masks_and_remembers() -> None:
    model, env = agent(env=masked_env()), masked_env()
    states: list[Any] = []
    predict = model.policy.predict

    def spy(observation: Any, state: Any, *args: Any) -> Any:
        states.append(state)
        return predict(observation, state, *args)

    model.policy.predict = spy  # type: ignore[method-assign, assignment]
    evaluate_policy(MaskedModel(model, env), env, 5)
    assert states[0] is None and all(state is not None for state in states[1:])


def test_evaluation_callback_masks_and_saves_the_best_model(tmp_path: Path) -> None:
    callback = MaskedEvalCallback(masked_env(), n_eval_episodes=5, eval_freq=8, best_model_save_path=str(tmp_path))
    agent(env=masked_env()).learn(48, callback)
    assert np.isfinite(callback.best_mean_reward)
    assert RecurrentPPO.load(tmp_path / "best_model").num_timesteps in (24, 48)


def test_evaluation_callback_cuts_episodes_without_an_end_and_says_so(tmp_path: Path) -> None:
    class Endless(MaskedEpisodes):
        def step(self, action: Any) -> Any:
            obs, reward, _, _, info = super().step(action)
            return obs, reward, False, False, info

    class StopAtSecond(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 2

    after = StopAtSecond()
    callback = MaskedEvalCallback(
        make_vec_env(Endless, 2),
        callback_after_eval=after,
        n_eval_episodes=3,
        eval_freq=8,
        log_path=str(tmp_path),
        max_episode_steps=20,
    )
    with pytest.warns(UserWarning, match=r"3 of 3 episodes of the evaluation were cut after 20 steps"):
        model = agent(env=masked_env()).learn(480, callback)
    # ended by the callback within it
    assert after.n_calls == 2 and model.num_timesteps == 48
    assert np.load(tmp_path / "evaluations.npz")["ep_lengths"].tolist() == [[20] * 3] * 2


def test_models_without_masks_are_evaluated_as_they_are() -> None:
    model = PPO("MlpPolicy", vec_env(), n_steps=8, batch_size=24)
    assert len(evaluate(model, vec_env(), 3).returns) == 3


class AllAllowed(RandomEpisodes):
    """Has masks, and takes every action."""

    def action_masks(self) -> np.ndarray:
        return np.ones(3, bool)


def test_playing_without_the_masks_of_training_is_warned_of_once(tmp_path: Path) -> None:
    env = make_vec_env(AllAllowed, 3)
    model = agent(env=env, steps=24)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy.zip"))
    for one in (model, RecurrentPPO.load(tmp_path / "model"), XLSTMPolicy.load(str(tmp_path / "policy.zip"))):
        with pytest.warns(UserWarning, match=r"no action_masks.*action_masks=get_action_masks\(env\).*MaskedModel"):
            one.predict(env.reset())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.predict(env.reset())
    with pytest.warns(UserWarning, match="trained with them"):
        evaluate_policy(RecurrentPPO.load(tmp_path / "model"), env, 1)


def test_playing_with_masks_or_without_training_in_them_is_not_warned_of() -> None:
    env = make_vec_env(AllAllowed, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = agent(env=env, steps=24)
        evaluate(model, env, 2)
        evaluate_policy(MaskedModel(model, env), env, 2)
        model.predict(env.reset(), action_masks=get_action_masks(env))
        agent(env=env, steps=24, use_masking=False).predict(env.reset())
        agent(steps=24).predict(np.zeros((3, 3), np.float32))


def test_lost_memory_is_warned_of() -> None:
    model = agent()
    with pytest.warns(UserWarning, match="state=None for episodes that go on"):
        model.predict(np.zeros((3, 3), np.float32), episode_start=np.array([True, False, True]))


# The switch and its mistakes.


def test_masks_may_be_ignored() -> None:
    class Suggests(RandomEpisodes):
        def action_masks(self) -> np.ndarray:
            return np.zeros(3, bool)

    model = agent(env=Suggests(), use_masking=False, steps=32)
    assert model.rollout_buffer.action_masks is None
    assert len(evaluate(model, make_vec_env(Suggests), 3).returns) == 3


def test_switch_is_saved(tmp_path: Path) -> None:
    agent(env=masked_env(), use_masking=True).save(tmp_path / "model")
    assert RecurrentPPO.load(tmp_path / "model").use_masking is True


def test_missing_masks_are_named() -> None:
    with pytest.raises(ValueError, match=r"use_masking=True needs environments with a method action_masks\(\)"):
        agent(use_masking=True, steps=24)


def test_continuous_actions_cannot_be_masked() -> None:
    class Continuous(RandomEpisodes):
        def action_masks(self) -> np.ndarray:
            return np.ones(2, bool)

    with pytest.raises(ValueError, match="set use_masking=False"):
        agent(env=Continuous(action="box"), steps=24)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, 4)), r"sizes \[4\]; actions MultiDiscrete\(\[3 2\]\) need 5"),
        (np.ones((3, 5)), r"of 2 environment\(s\) have the shape \(3, 5\)"),
        ([np.ones(5), np.ones(4)], r"sizes \[4, 5\]"),
        (np.array([[1, 0, 0, 1, 0], [1, 1, 1, 0, 0]]), "environment 1 forbids every choice of component 1"),
        # as they are added to logits: taken for booleans they would allow what they forbid
        (np.array([[0, -np.inf, 0, 0, 0], [0, 0, 0, 0, -np.inf]]), r"holds \[0.0, -inf, 0.0, 0.0, 0.0\], no booleans"),
        (np.full((2, 5), np.nan), r"holds \[nan, .*no booleans"),
        (np.array([[True, True, True, True, None]] * 2, object), r"holds \[True, .*no booleans"),
    ],
)
def test_wrong_masks_are_named(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_masks(masks, spaces.MultiDiscrete([3, 2]), 2)


@pytest.mark.parametrize("form", [np.int8, np.float32, torch.from_numpy, np.ndarray.tolist])
def test_masks_may_be_zeros_and_ones_of_any_kind(form: Any) -> None:
    given = np.array([[1, 0, 0, 1, 0], [1, 1, 1, 0, 1]])
    checked = check_masks([form(row) for row in given], spaces.MultiDiscrete([3, 2]), 2)
    np.testing.assert_array_equal(checked, given == 1)


class Refusing(MaskedEpisodes):
    """Allows nothing in the second step."""

    def action_masks(self) -> np.ndarray:
        return self.mask & (self.left > self.longest - 1)


def test_masks_that_allow_nothing_are_a_fault_of_the_environment() -> None:
    model = RecurrentPPO("MlpXLSTMPolicy", make_vec_env(Refusing, 2), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(FaultyEnvironmentError, match=r"failed in action_masks\(\): .* forbids every choice"):
        model.learn(16)


# Learning.


class MaskedRecall(gym.Env[np.ndarray, Any]):
    """Wait, then answer which of two cues came first: one or two of 30 actions are allowed in a step."""

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(30)
    delay = 4

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(2)), 0
        return np.eye(3, dtype=np.float32)[self.cue], {}

    def step(self, action: int) -> Any:
        assert self.action_masks()[action]
        self.time += 1
        asked = self.time == self.delay
        done = self.time > self.delay
        return np.array([0, 0, asked], np.float32), float(done and action == 10 + 10 * self.cue), done, False, {}

    def action_masks(self) -> np.ndarray:
        mask = np.zeros(30, bool)
        mask[[10, 20] if self.time == self.delay else [self.time]] = True
        return mask


def test_recall_is_learnt_where_most_actions_are_invalid() -> None:
    model = RecurrentPPO(
        "MlpXLSTMPolicy",
        make_vec_env(MaskedRecall, 8, seed=0),
        learning_rate=3e-3,
        n_steps=50,
        batch_size=200,
        n_epochs=4,
        policy_kwargs={"memory_kwargs": {"hidden_size": 16, "num_heads": 2, "blocks": "m"}, "net_arch": []},
        seed=0,
        device="cpu",
    )
    model.learn(4000)
    env = make_vec_env(MaskedRecall, 8, seed=1)
    assert evaluate(model, env, 50, seed=2).returns.mean() == 1
    # fair coins: beyond 0.75 once in 5000
    assert evaluate(model, env, 50, seed=2, empty_state_every_step=True).returns.mean() < 0.75
