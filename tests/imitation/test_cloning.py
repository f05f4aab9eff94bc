"""Behaviour cloning of whole sequences: its loss, its targets, what it learns and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import ACTIONS, vec_env
from xlstm_rl import RecurrentPPO, evaluate, imitate, imitation_loss, record_demonstrations
from xlstm_rl.imitation.cloning import _laid_end_to_end, _up_to_date, as_drawn
from xlstm_rl.imitation.demonstrations import Demonstration
from xlstm_rl.vec_envs.env_contract import map_obs


class RandomPlayer:
    """Uniformly random actions, the same after the same seed."""

    def __init__(self, space: spaces.Space[Any], seed: int = 0) -> None:
        self.space = space
        self.space.seed(seed)

    def predict(self, observation: Any, episode_start: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
        return np.stack([self.space.sample() for _ in episode_start]), None


def demonstrations(count: int = 7, **kwargs: Any) -> list[Demonstration]:
    env = vec_env(**kwargs)
    return record_demonstrations(env, count, RandomPlayer(env.action_space), seed=3)


def stepwise(model: RecurrentPPO, episodes: list[Demonstration]) -> float:
    """The mean negative log-likelihood of the actions, one step after the other."""
    policy, total, steps = model.policy, 0.0, 0
    normalizer = model.get_vec_normalize_env()
    policy.set_training_mode(False)
    for episode in episodes:
        state, start = policy.initial_state(1), torch.tensor([True])
        observations = episode.observations if normalizer is None else normalizer.normalize_obs(episode.observations)
        for t, action in enumerate(episode.actions):
            obs, _ = policy.obs_to_tensor(map_obs(lambda part, t=t: part[t], observations))
            with torch.no_grad():
                latents = policy.latents(obs, state, start)
                drawn = torch.as_tensor(np.asarray(action)[None], dtype=torch.float32)
                distribution = policy.action_distribution(latents.actor, None)
                total -= float(distribution.log_prob(drawn.view(1, -1) if drawn.ndim > 1 else drawn))
            state, start, steps = latents.state, torch.tensor([False]), steps + 1
    return total / steps


@pytest.mark.parametrize("action", ACTIONS)
def test_loss_is_the_mean_negative_log_likelihood_step_by_step(action: str) -> None:
    episodes, model = demonstrations(action=action), agent(action=action, seq_len=5)
    assert imitation_loss(model, episodes) == pytest.approx(stepwise(model, episodes), rel=1e-5)
    # memory states at chunk starts are those of the weights that the training led to
    imitate(model, episodes, epochs=2)
    assert imitation_loss(model, episodes) == pytest.approx(stepwise(model, episodes), rel=1e-5)


@pytest.mark.parametrize("observation", ["image", "discrete, not from 0", "whole numbers", "dict, not from 0"])
def test_observations_of_every_kind_are_seen_as_in_play(observation: str) -> None:
    episodes, model = demonstrations(observation=observation), agent(observation, seq_len=5)
    assert imitation_loss(model, episodes) == pytest.approx(stepwise(model, episodes), rel=1e-5)


def test_observations_are_normalised_as_in_play() -> None:
    episodes, env = demonstrations(), VecNormalize(vec_env())
    model = agent(env=env)
    imitate(model, episodes, epochs=1)
    seen = np.concatenate([episode.observations for episode in episodes])
    running: Any = env.obs_rms
    assert np.allclose(running.mean, seen.mean(0), atol=1e-3) and running.count == pytest.approx(len(seen), abs=1e-3)
    before = copy.deepcopy(running.mean)
    assert imitation_loss(model, episodes) == pytest.approx(stepwise(model, episodes), rel=1e-5)
    assert np.array_equal(before, running.mean)


def test_memory_is_emptied_where_an_episode_starts() -> None:
    episodes, model = demonstrations(), agent(n_steps=64, batch_size=64)
    lengths = np.array([len(episode.rewards) for episode in episodes])
    alone = np.array([imitation_loss(model, [episode]) for episode in episodes])
    assert imitation_loss(model, episodes) == pytest.approx((alone * lengths).sum() / lengths.sum(), rel=1e-5)


def test_critic_is_to_say_discounted_returns_and_its_own_value_where_a_time_limit_cut() -> None:
    episodes = [episode for episode in demonstrations(12) if len(episode.rewards) > 2]
    assert {bool(episode.terminations[-1]) for episode in episodes} == {True, False}
    for episode in episodes:
        model = agent(n_steps=64, batch_size=64, gamma=0.8)
        buffer = _laid_end_to_end(model, as_drawn(model, [episode]))
        chunks = _up_to_date(model, buffer, buffer.chunks(torch.from_numpy(buffer.advantages)))
        total = 0.0
        if episode.truncations[-1]:
            obs = torch.as_tensor(episode.observations)[None]
            reset = torch.zeros(1, obs.shape[1], dtype=torch.bool)
            with torch.no_grad():
                played = model.policy.evaluate_sequence(obs, reset.float(), model.policy.initial_state(1), reset)
            total = float(played.values[0, -1])
        expected = []
        for reward in episode.rewards[::-1]:
            total = reward + 0.8 * total
            expected.append(total)
        steps = len(episode.rewards)
        assert np.allclose(chunks.returns[0, :steps].numpy()[::-1], expected, atol=1e-5)
        assert chunks.weights[0].tolist() == [1.0] * steps + [0.0] * int(episode.truncations[-1])


def test_every_step_counts_once() -> None:
    episodes, model = demonstrations(9), agent(seq_len=5)
    buffer = _laid_end_to_end(model, as_drawn(model, episodes))
    chunks = buffer.chunks(torch.from_numpy(buffer.advantages))
    counted = chunks.observations[chunks.weights > 0]
    given = np.concatenate([episode.observations[:-1] for episode in episodes])
    assert np.array_equal(np.sort(counted.numpy(), 0), np.sort(given, 0))
    assert int((chunks.episode_starts & (chunks.weights > 0)).sum()) == len(episodes)


def test_squashed_actions_are_those_of_the_environment() -> None:
    model = agent(action="box", use_sde=True, policy_kwargs={"squash_output": True})
    episodes = demonstrations(action="box")
    scaled = [episode._replace(actions=episode.actions / 2) for episode in episodes]
    drawn = np.concatenate([episode.actions for episode in as_drawn(model, episodes)])
    assert np.allclose(drawn, np.concatenate([episode.actions for episode in scaled]))


def test_actions_that_do_not_start_at_0_are_told_apart() -> None:
    space = spaces.Discrete(3, start=4)
    model = agent()
    model.action_space = model.policy.action_space = space
    shifted = [episode._replace(actions=episode.actions + 4) for episode in demonstrations()]
    assert imitation_loss(model, shifted) == pytest.approx(imitation_loss(agent(), demonstrations()), rel=1e-6)


def test_optimiser_and_counters_are_left_alone() -> None:
    model = agent(steps=48)
    optimizer, norm = copy.deepcopy(model.policy.optimizer.state_dict()), model._gradient_norm
    losses = imitate(model, demonstrations(), epochs=3)
    assert len(losses) == 3 and losses[-1] < losses[0]
    after = model.policy.optimizer.state_dict()
    assert after["param_groups"] == optimizer["param_groups"]
    for index, kept in optimizer["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in kept.items())
    assert (model.num_timesteps, model._gradient_norm) == (48, norm)
    model.learn(24, reset_num_timesteps=False)


def test_a_clone_of_the_oracle_remembers() -> None:
    env = make_vec_env("xlstm_rl/CueRecall-v0", 4, seed=5)
    model = RecurrentPPO("MlpXLSTMPolicy", env, learning_rate=1e-2, batch_size=128, seed=0, device="cpu")
    imitate(model, record_demonstrations(make_vec_env("xlstm_rl/CueRecall-v0", 4), 100, seed=9), epochs=10)
    assert evaluate(model, env, 100, seed=1).returns.mean() == 1
    # 100 fair coins: beyond 0.7 once in 25 000
    assert evaluate(model, env, 100, empty_state_every_step=True, seed=1).returns.mean() < 0.7


class Echo:
    """Does what it saw one step before; at the start of an episode what it sees."""

    last: np.ndarray | None = None

    def predict(self, observation: np.ndarray, episode_start: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
        before = observation if self.last is None else np.where(episode_start[:, None], observation, self.last)
        self.last = observation
        return self.act(before), None

    def act(self, before: np.ndarray) -> np.ndarray:
        return before[:, :2]


class EchoOfChoices(Echo):
    def act(self, before: np.ndarray) -> np.ndarray:
        return (before[:, :2] > 0).astype(int)


@pytest.mark.parametrize(
    ("action", "player", "error"), [("box", Echo(), 0.2), ("multi-discrete", EchoOfChoices(), 0.1)]
)
def test_actions_of_every_kind_are_learnt_from_memory(action: str, player: Echo, error: float) -> None:
    env = vec_env(8, action=action)
    episodes = record_demonstrations(env, 400, player, seed=3)
    policy_kwargs = {"memory_kwargs": {"hidden_size": 32, "blocks": "m"}, "net_arch": [64]}
    model = agent(env=env, learning_rate=5e-3, n_steps=64, batch_size=256, policy_kwargs=policy_kwargs)
    imitate(model, episodes[:350], epochs=12)
    wrong = []
    for episode in episodes[350:]:
        state = None
        for obs, expected in zip(episode.observations, episode.actions, strict=False):
            chosen, state = model.predict(obs, state=state, deterministic=True)
            wrong.append(np.abs(chosen - expected).mean())
    # chance: 0.67 of uniform numbers between -1 and 1, half of the choices
    assert np.mean(wrong) < error


def changed(**parts: Any) -> list[Any]:
    return [demonstrations()[0]._replace(**parts)]


ONE = demonstrations()[0]


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([], "no episodes"),
        (changed(observations=ONE.observations[:-1]), "the observations of episode 0 are of shape"),
        (changed(observations=ONE.observations * np.nan), "not all finite"),
        (changed(actions=ONE.actions + 3), "the actions of episode 0 have .* none of Discrete"),
        (changed(actions=ONE.actions[:, None, None]), "the actions of episode 0 are of shape"),
        (changed(terminations=ONE.terminations & False, truncations=ONE.truncations & False), "does not end with its"),
        (changed(truncations=~ONE.truncations), "and only there"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(episodes: list[Any], message: str) -> None:
    model = agent()
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(ValueError, match=message):
        imitate(model, episodes)
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())


def test_parts_of_observations_that_are_missing_are_named() -> None:
    episodes = [
        episode._replace(observations={"vector": episode.observations["vector"]})
        for episode in demonstrations(observation="dict")
    ]
    with pytest.raises(ValueError, match=r"episode 0 lack \['flag'\]"):
        imitate(agent("dict"), episodes)
