"""Evaluation plays what it says, without favour for short episodes."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from xlstm_rl.agents import evaluate, evaluate_random


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
