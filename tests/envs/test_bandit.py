"""Two-armed bandit: its pay, its optimum by dynamic programming, its memoryless ceiling."""

from collections.abc import Callable
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from xlstm_rl.envs import Bandit


def play(env: Bandit, policy: Callable[[NDArray[np.float32]], int]) -> float:
    seen, _ = env.reset()
    total, ended = 0.0, False
    while not ended:
        seen, reward, ended, _, _ = env.step(policy(seen))
        total += reward
    return total


def stay_or_change(seen: NDArray[np.float32]) -> int:
    """After a win the same arm, after a loss the other one."""
    return int(seen[1] == seen[2]) if seen[:2].any() else 0


@pytest.mark.parametrize(("num_pulls", "better"), [(2, 0.8), (5, 0.6), (20, 0.8), (12, 0.95)])
def test_the_optimum_is_that_of_dynamic_programming_over_beliefs(num_pulls: int, better: float) -> None:
    @cache
    def value(votes: int, pulls: int) -> float:
        """Votes for arm 1 minus votes for arm 0; both arms are tried."""
        if pulls == num_pulls:
            return 0.0
        odds = (better / (1 - better)) ** votes
        belief = odds / (1 + odds)
        values: list[float] = []
        for first_is_better in (1 - belief, belief):
            pays = first_is_better * better + (1 - first_is_better) * (1 - better)
            sign = 1 if len(values) else -1
            values.append(
                pays * (1 / num_pulls + value(votes + sign, pulls + 1)) + (1 - pays) * value(votes - sign, pulls + 1)
            )
        return max(values)

    assert Bandit(num_pulls, better).facts.optimal_return == pytest.approx(value(0, 0), abs=1e-12)


def test_many_pulls_have_bounds_too() -> None:
    facts = Bandit(50_000, 0.8).facts
    assert facts.optimal_return == pytest.approx(0.8, abs=1e-4)
    assert Bandit(1000).facts.optimal_return < facts.optimal_return < 0.8


@pytest.mark.parametrize(("num_pulls", "better"), [(2, 0.8), (6, 0.7), (20, 0.8)])
def test_no_memoryless_policy_beats_the_stated_ceiling(num_pulls: int, better: float) -> None:
    grid = np.linspace(0.0, 1.0, 6)
    # Chances of arm 1 at the first pull, and after (arm, paid) = (0, no), (0, yes), (1, no), (1, yes).
    first, *after = np.meshgrid(*[grid] * 5, indexing="ij")
    total = np.zeros_like(first)
    for pays in (np.array([better, 1 - better]), np.array([1 - better, better])):
        one = first
        for _ in range(num_pulls):
            total += ((1 - one) * pays[0] + one * pays[1]) / num_pulls / 2
            stays = pays[0] * after[1] + (1 - pays[0]) * after[0], pays[1] * after[3] + (1 - pays[1]) * after[2]
            one = (1 - one) * stays[0] + one * stays[1]
    assert total.max() == pytest.approx(Bandit(num_pulls, better).facts.memoryless_return, abs=1e-12)


def test_the_oracle_and_the_best_memoryless_policy_collect_the_stated_returns() -> None:
    env = Bandit()
    env.reset(seed=0)
    oracle = [play(env, lambda _: env.oracle_action()) for _ in range(2000)]
    memoryless = [play(env, stay_or_change) for _ in range(2000)]
    assert np.mean(oracle) == pytest.approx(env.facts.optimal_return, abs=4 * np.std(oracle) / np.sqrt(2000))
    assert np.mean(memoryless) == pytest.approx(env.facts.memoryless_return, abs=4 * np.std(memoryless) / np.sqrt(2000))


def test_the_better_arm_pays_as_often_as_stated() -> None:
    env = Bandit(10, 0.7)
    env.reset(seed=0)
    returns = [play(env, lambda _: env.better) for _ in range(1000)]
    assert np.mean(returns) == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / 10000))


def test_exactly_one_arm_would_pay() -> None:
    pays = []
    for arm in (0, 1):
        env = Bandit()
        env.reset(seed=5)
        pays.append([env.step(arm)[1] > 0 for _ in range(20)])
    assert [a != b for a, b in zip(*pays, strict=True)] == [True] * 20


def test_the_observation_is_the_last_arm_and_whether_it_paid() -> None:
    env = Bandit()
    seen, _ = env.reset(seed=0)
    assert not seen.any()
    for arm in (0, 1, 1, 0):
        seen, reward, *_ = env.step(arm)
        assert seen.tolist() == [float(arm == 0), float(arm == 1), float(reward > 0)]


def test_success_is_the_better_arm_in_the_last_pull() -> None:
    env = Bandit(3)
    for right in (True, False):
        env.reset(seed=0)
        infos = [env.step(0)[4], env.step(0)[4], env.step(env.better if right else 1 - env.better)[4]]
        assert infos == [{}, {}, {"is_success": right}]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


def test_render_tells_the_last_pull() -> None:
    env = Bandit(4, render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == f"pull 0/4: no pull yet; arm {env.better} is better\n"
    _, reward, *_ = env.step(1)
    assert env.render() == f"pull 1/4: arm 1 paid {int(reward > 0)}; arm {env.better} is better\n"


@pytest.mark.parametrize(
    ("num_pulls", "better", "message"),
    [
        (1, 0.8, "num_pulls must be at least 2, got 1"),
        (20, 0.5, "better must be above 0.5, got 0.5"),
        (20, 1.5, "better must be finite and in 0.5..1.0, got 1.5"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(num_pulls: int, better: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bandit(num_pulls, better)


@pytest.mark.parametrize("action", [-1, 2])
def test_an_action_out_of_range_is_refused(action: int) -> None:
    env = Bandit()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"action must be in 0\.\.1, got {action}"):
        env.step(action)
