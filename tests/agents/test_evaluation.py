"""Evaluation plays what it says, without favour for short episodes."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.agents.small_agents import agent
from tests.agents.spaces_for_tests import RandomEpisodes
from xlstm_rl.agents import RecurrentPPO, evaluate, evaluate_random


class ShortSuccesses(gym.Env[np.ndarray, Any]):
    """Nine of ten episodes succeed after 3 steps, one fails after 40."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.success = bool(self.np_random.random() < 0.9)
        self.left = 3 if self.success else 40
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> Any:
        self.left -= 1
        done = self.left == 0
        info = {"is_success": self.success} if done else {}
        return np.zeros(1, np.float32), float(done and self.success), done, False, info


def test_long_episodes_count_as_often_as_they_happen() -> None:
    env = make_vec_env(ShortSuccesses, n_envs=16, seed=0)
    result = evaluate_random(env, 3210, seed=0)
    assert len(result.returns) == 3210
    assert result.successes is not None
    # three standard errors
    assert result.successes.mean() == pytest.approx(0.9, abs=0.016)
    assert result.returns.mean() == pytest.approx(result.successes.mean())


class Counter:
    """A model that counts the steps of its episode and notes what it was told."""

    def __init__(self) -> None:
        self.longest = 0

    def predict(self, obs: Any, state: Any, episode_start: np.ndarray, deterministic: bool) -> tuple[np.ndarray, Any]:
        state = np.where(episode_start, 0, 0 if state is None else state) + 1
        self.longest = max(self.longest, int(state.max()))
        return np.zeros(len(obs), int), state


SAMPLED: dict[str, dict[str, Any]] = {
    "categorical": {"action": "discrete"},
    "gaussian": {"action": "box"},
    "gSDE": {"action": "box", "use_sde": True},
}


class PaysForActions(RandomEpisodes):
    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, float(np.sum(action)), *rest


def sampling_agent(kind: str) -> RecurrentPPO:
    env = make_vec_env(PaysForActions, n_envs=2, env_kwargs={"action": SAMPLED[kind]["action"]})
    return agent(env=env, **SAMPLED[kind])


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_play_follows_from_the_seed(kind: str) -> None:
    model = sampling_agent(kind)

    def returns(seed: int) -> Any:
        # whatever was drawn before
        torch.rand(3)
        if kind == "gSDE":
            model.policy.reset_noise(2)
        env = make_vec_env(PaysForActions, n_envs=2, env_kwargs={"action": SAMPLED[kind]["action"]})
        return evaluate(model, env, 6, deterministic=False, seed=seed).returns.tolist()

    assert returns(1) == returns(1)
    assert returns(1) != returns(2)


@pytest.mark.parametrize("kind", SAMPLED)
def test_seeded_play_leaves_the_random_numbers_of_training_alone(kind: str) -> None:
    model = sampling_agent(kind)
    before, noise = torch.get_rng_state(), dict(vars(model.policy.action_dist))
    evaluate(model, make_vec_env(PaysForActions, env_kwargs={"action": SAMPLED[kind]["action"]}), 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    if kind == "gSDE":
        assert vars(model.policy.action_dist)["exploration_mat"] is noise["exploration_mat"]


@pytest.mark.parametrize(("empty", "longest"), [(False, 40), (True, 1)])
def test_memory_is_carried_or_emptied(empty: bool, longest: int) -> None:
    model = Counter()
    evaluate(model, make_vec_env(ShortSuccesses, n_envs=4), 100, empty_state_every_step=empty, seed=0)
    assert model.longest == longest


def test_fewer_episodes_than_environments() -> None:
    result = evaluate(Counter(), make_vec_env(ShortSuccesses, n_envs=4), 3, seed=0)
    assert len(result.lengths) == 3


@pytest.mark.parametrize(
    "make",
    [ShortSuccesses, lambda: gym.vector.SyncVectorEnv([ShortSuccesses] * 2)],
    ids=["environment", "vector environment of gymnasium"],
)
def test_environments_of_gymnasium_are_played_as_they_are(make: Any) -> None:
    for result in (evaluate(Counter(), make(), 3, seed=0), evaluate_random(make(), 3, seed=0)):
        assert set(result.lengths) <= {3, 40}
        assert len(result.lengths) == 3


def test_what_is_no_environment_is_refused() -> None:
    with pytest.raises(TypeError, match=r"env='CartPole-v1' is no environment: hand over what gymnasium\.make,"):
        evaluate_random("CartPole-v1", 3)  # type: ignore[arg-type]


def test_no_episode_is_refused() -> None:
    with pytest.raises(ValueError, match="n_episodes=0"):
        evaluate_random(make_vec_env(ShortSuccesses), 0)


@pytest.mark.parametrize("monitored", (True, False))
def test_normalised_environment_gives_raw_returns_and_learns_nothing(monitored: bool) -> None:
    def make() -> gym.Env[Any, Any]:
        env = gym.make("Pendulum-v1", max_episode_steps=20)
        return Monitor(env) if monitored else env

    env = VecNormalize(DummyVecEnv([make, make]))
    model = agent(env=env)
    model.learn(64)
    statistics: Any = env.obs_rms
    before = (statistics.count, env.ret_rms.var.copy())
    result = evaluate(model, env, 4, seed=0)
    assert (statistics.count, env.ret_rms.var) == before
    assert env.training
    # a step costs several units before normalisation, about one after it
    assert (result.returns < -30).all()
    env.norm_reward = False
    assert evaluate(model, env, 4, seed=0).returns == pytest.approx(result.returns, abs=1e-3)


class Counted(gym.Env[np.ndarray, Any]):
    """Observes [episode, step]; episodes take 7 steps."""

    observation_space = spaces.Box(0, 1000, (2,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)
    episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.episode, self.now = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action: int) -> Any:
        self.now += 1
        return np.array([self.episode, self.now], np.float32), 1.0, self.now == 7, False, {}


class CountedVector(gym.vector.SyncVectorEnv):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__([Counted, Counted])


OWN: dict[str, Any] = {
    "single": Counted,
    "vector": lambda: make_vec_env(Counted, 2),
    "normalised": lambda: VecNormalize(make_vec_env(Counted, 2), norm_obs=False),
    "gymnasium": CountedVector,
}


def assert_episodes_are_whole(model: RecurrentPPO) -> None:
    """Every episode of the rollout starts with its first step, and memory is emptied there and nowhere else."""
    steps = model.rollout_buffer.observations[..., 1]
    assert np.array_equal(steps == 0, model.rollout_buffer.episode_starts)
    assert set(np.diff(steps, axis=0).flatten()) <= {1, -6}
    assert (steps[0] == 0).all()


@pytest.mark.parametrize("kind", OWN)
def test_training_goes_on_with_new_episodes_where_its_environment_was_evaluated_in(kind: str) -> None:
    env = OWN[kind]()
    model = agent(env=env, n_steps=12, batch_size=12)
    model.learn(24)
    evaluate(model, env, 3)
    model.learn(12 * model.n_envs, reset_num_timesteps=False)
    assert_episodes_are_whole(model)


def test_evaluation_elsewhere_leaves_the_episodes_of_training_alone() -> None:
    model = agent(env=make_vec_env(Counted, 2), n_steps=12, batch_size=12)
    model.learn(24)
    evaluate(model, make_vec_env(Counted, 2), 3)
    model.learn(24, reset_num_timesteps=False)
    assert model.rollout_buffer.observations[0, :, 1].tolist() == [5, 5]


class EvaluateInTraining(BaseCallback):
    """Evaluates in the environment of training, between rollouts or within."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within = within

    def _on_rollout_start(self) -> None:
        if not self.within:
            evaluate(self.model, self.training_env, 2)

    def _on_step(self) -> bool:
        if self.within:
            evaluate(self.model, self.training_env, 2)
        return True


def test_callback_may_evaluate_in_the_environment_of_training_between_rollouts_only() -> None:
    model = agent(env=make_vec_env(Counted, 2), n_steps=12, batch_size=12)
    model.learn(48, callback=EvaluateInTraining(within=False))
    assert_episodes_are_whole(model)
    with pytest.raises(ValueError, match="env is the one in which the model is collecting a rollout"):
        model.learn(24, callback=EvaluateInTraining(within=True))
