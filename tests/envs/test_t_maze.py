"""The T-maze: its oracle, its exact memoryless ceiling, its walls and its limit."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from xlstm_rl.envs import TMaze

FORWARD, LEFT, RIGHT = range(3)
Policy = Callable[[NDArray[np.float32]], int]


class Outcome(NamedTuple):
    reward: float
    steps: int
    terminated: bool
    truncated: bool
    success: bool


def play(env: TMaze, policy: Policy, *, seed: int | None = None) -> Outcome:
    observation, _ = env.reset(seed=seed)
    for step in itertools.count(1):
        observation, reward, terminated, truncated, info = env.step(policy(observation))
        if terminated or truncated:
            return Outcome(reward, step, terminated, truncated, info["is_success"])
        assert reward == 0.0 and info == {}
    raise AssertionError


def follow(table: tuple[int, ...]) -> Policy:
    return lambda seen: table[int(seen.argmax())]


def arrival(length: int, first_forward: float, forward: float, turn: float) -> float:
    """Probability that some arm is entered in time, given per-cell probabilities of the only actions that matter."""
    position = np.zeros(length + 1)
    position[0] = 1.0
    entered = 0.0
    for step in range(4 * (length + 1)):
        entered += position[length] * turn
        ahead = position[:length] * (first_forward if step == 0 else forward)
        position[length] *= 1.0 - turn
        position[:length] -= ahead
        position[1:] += ahead
    return entered


@pytest.mark.parametrize("length", [1, 2, 10, 50, 1000])
def test_the_oracle_reaches_the_optimum_by_the_shortest_path(length: int) -> None:
    env = TMaze(length)
    for seed in range(5):
        outcome = play(env, lambda _: env.oracle_action(), seed=seed)
        assert outcome == Outcome(env.facts.optimal_return, length + 1, terminated=True, truncated=False, success=True)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_no_deterministic_memoryless_policy_beats_the_stated_ceiling(length: int) -> None:
    env = TMaze(length)
    seeds = {int(env.reset(seed=seed)[0].argmax()): seed for seed in range(20)}
    assert sorted(seeds) == [0, 1]
    returns = [
        np.mean([play(env, follow(table), seed=seed).reward for seed in seeds.values()])
        for table in itertools.product(range(3), repeat=4)
    ]
    assert max(returns) == env.facts.memoryless_return == 0.5


@pytest.mark.parametrize("length", [1, 3])
def test_no_stochastic_memoryless_policy_beats_the_stated_ceiling(length: int) -> None:
    grid = np.linspace(0.0, 1.0, 6)
    best = 0.0
    for after_left, after_right, forward, turn, left_share in itertools.product(grid, repeat=5):
        value = 0.5 * arrival(length, after_left, forward, turn) * left_share
        value += 0.5 * arrival(length, after_right, forward, turn) * (1.0 - left_share)
        best = max(best, value)
    assert best == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("length", "stated"), [(10, 0.94), (50, 0.997)])
def test_random_actions_reach_an_arm_as_often_as_documented(length: int, stated: float) -> None:
    assert arrival(length, 1 / 3, 1 / 3, 2 / 3) == pytest.approx(stated, abs=0.005)


def test_random_actions_collect_half_of_their_arrivals() -> None:
    env = TMaze(10)
    generator = np.random.default_rng(0)
    env.reset(seed=0)
    returns = [play(env, lambda _: int(generator.integers(3))).reward for _ in range(2000)]
    expected = arrival(10, 1 / 3, 1 / 3, 2 / 3) / 2
    assert np.mean(returns) == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(2000))


def test_the_sign_is_seen_in_the_first_observation_only() -> None:
    env = TMaze(3)
    sign, _ = env.reset(seed=0)
    later = [env.step(action)[0].tolist() for action in (LEFT, RIGHT, FORWARD, FORWARD, LEFT)]
    assert sign[:2].sum() == 1.0 and not sign[2:].any()
    assert later == [[0.0, 0.0, 1.0, 0.0]] * 5


def test_observations_before_the_turn_are_the_same_after_either_sign() -> None:
    env = TMaze(6)
    walks = {}
    for seed in range(20):
        sign = int(env.reset(seed=seed)[0].argmax())
        walks[sign] = [env.step(FORWARD)[0].tolist() for _ in range(8)]
    assert walks[0] == walks[1]
    assert walks[0] == [[0.0, 0.0, 1.0, 0.0]] * 5 + [[0.0, 0.0, 0.0, 1.0]] * 3


def test_the_wrong_arm_ends_the_episode_without_reward() -> None:
    env = TMaze(1)
    env.reset(seed=0)
    env.step(FORWARD)
    wrong = LEFT + RIGHT - env.oracle_action()
    observation, reward, terminated, truncated, info = env.step(wrong)
    assert (reward, terminated, truncated, info) == (0.0, True, False, {"is_success": False})
    assert not observation.any()


@pytest.mark.parametrize("idle", [FORWARD, LEFT])
def test_an_idle_episode_is_truncated_at_the_limit(idle: int) -> None:
    env = TMaze(4)
    outcome = play(env, lambda _: idle, seed=0)
    assert outcome == Outcome(0.0, env.facts.horizon, terminated=False, truncated=True, success=False)


def test_an_arm_entered_at_the_last_moment_counts() -> None:
    env = TMaze(2)
    env.reset(seed=0)
    for _ in range(env.facts.horizon - 3):
        env.step(LEFT)
    env.step(FORWARD)
    env.step(FORWARD)
    _, reward, terminated, truncated, info = env.step(env.oracle_action())
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})


def test_both_signs_are_equally_likely() -> None:
    env = TMaze(1)
    env.reset(seed=0)
    lefts = sum(env.reset()[0][0] for _ in range(2000))
    assert lefts == pytest.approx(1000, abs=4 * np.sqrt(500))


def test_returned_observations_are_not_shared() -> None:
    env = TMaze(3)
    observation, _ = env.reset(seed=0)
    observation[:] = 9.0
    env.step(FORWARD)[0][:] = 9.0
    assert env.reset(seed=0)[0].max() == 1.0
    assert env.step(FORWARD)[0].max() == 1.0


def test_render_draws_the_maze() -> None:
    env = TMaze(3, render_mode="ansi")
    drawings = {}
    for seed in range(20):
        sign = int(env.reset(seed=seed)[0].argmax())
        env.step(FORWARD)
        drawings[sign] = env.render()
    assert drawings == {0: "   $\n.A..\n   .\n", 1: "   .\n.A..\n   $\n"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TMaze(0), "corridor_length must be at least 1, got 0"),
        (lambda: TMaze(render_mode="human"), "render_mode must be None or one of .*got 'human'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: Callable[[], TMaze], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("action", [-1, 3])
def test_an_action_out_of_range_is_refused(action: int) -> None:
    env = TMaze()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"action must be in 0\.\.2, got {action}"):
        env.step(action)


def test_stepping_past_the_end_or_before_a_reset_is_refused() -> None:
    env = TMaze(1)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(FORWARD)
    play(env, lambda _: LEFT, seed=0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(FORWARD)
