"""Several episodes that an agent takes for one."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from xlstm_rl.agents import GymnasiumVecEnv
from xlstm_rl.agents.evaluation import evaluate
from xlstm_rl.bench.measuring import EpisodesInARow


class Counter(gymnasium.Env[np.ndarray, np.int64]):
    """Pays 1 a step and ends after 2 steps, or 3 where it is the second of its kind."""

    observation_space = gymnasium.spaces.Box(0, 9, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    made = 0

    def __init__(self) -> None:
        self.length = 2 + Counter.made % 2
        Counter.made += 1
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        over = self.steps == self.length
        return np.full(1, self.steps, np.float32), 1.0, over, False, {"is_success": True} if over else {}


class Recorder:
    """Notes the observations and starts that it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[float], list[bool]]] = []

    def predict(self, observation: np.ndarray, state: Any, episode_start: np.ndarray, deterministic: bool) -> Any:
        self.seen.append((observation[:, 0].tolist(), episode_start.tolist()))
        return np.zeros(len(observation), int), state


@pytest.mark.parametrize("normalized", [False, True])
def test_agent_is_told_of_the_first_start_only_and_gets_the_sum(normalized: bool) -> None:
    Counter.made = 0
    env: Any = make_vec_env(Counter, n_envs=2)
    if normalized:
        env = VecNormalize(env, norm_obs=False, clip_reward=0.25)
    recorder = Recorder()
    result = evaluate(recorder, EpisodesInARow(env, 3), 2)
    assert sorted(zip(result.returns, result.lengths, strict=True)) == [(6.0, 6), (9.0, 9)]
    assert result.successes is None
    assert [seen for seen, _ in recorder.seen[:6]] == [[0, 0], [1, 1], [0, 2], [1, 0], [0, 1], [1, 2]]
    starts = [start for _, start in recorder.seen]
    assert starts == [[True, True]] + [[False, False]] * 5 + [[True, False]] + [[False, False]] * 2


def test_one_episode_in_a_row_is_an_episode() -> None:
    env = make_vec_env("xlstm_rl/Parity-v0", n_envs=3)
    plain = evaluate(Recorder(), env, 12, seed=5)
    wrapped = evaluate(Recorder(), EpisodesInARow(env, 1), 12, seed=5)
    assert np.allclose(plain.returns, wrapped.returns, atol=1e-5)


def test_reset_starts_the_count_anew() -> None:
    Counter.made = 0
    env = EpisodesInARow(make_vec_env(Counter, n_envs=1), 2)
    env.reset()
    for _ in range(2):
        env.step(np.zeros(1, int))
    env.reset()
    ends = [bool(env.step(np.zeros(1, int))[2][0]) for _ in range(4)]
    assert ends == [False, False, False, True]


@pytest.mark.parametrize("count", [2, 3])
def test_steps_that_are_resets_are_no_episodes(count: int) -> None:
    env = GymnasiumVecEnv(gymnasium.make_vec("CartPole-v1", 2, "vector_entry_point"))
    single = evaluate(Recorder(), env, 2 * count, seed=0)
    result = evaluate(Recorder(), EpisodesInARow(env, count), 2, seed=0)
    assert result.returns.sum() == single.returns.sum()


def test_no_episode_in_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        EpisodesInARow(make_vec_env("CartPole-v1"), 0)
