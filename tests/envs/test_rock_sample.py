"""RockSample: its rules, its sensor and its scripted player."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.envs.episodes import play
from xlstm_rl.envs import RockSample

NORTH, EAST, SOUTH, WEST, SAMPLE = range(5)


def test_rocks_lie_apart_outside_the_last_column_and_stay() -> None:
    env = RockSample(15, 15)
    rocks = [*env.rocks]
    assert len({*rocks}) == 15 and all(0 <= row < 15 and 0 <= column < 14 for row, column in rocks)
    env.reset(seed=1)
    assert env.rocks == rocks == RockSample(15, 15).rocks != RockSample(15, 15, layout=1).rocks


def test_goodness_and_starts_are_uniform() -> None:
    env = RockSample(3, 4)
    env.reset(seed=0)
    good, starts = np.zeros(4), np.zeros((3, 3))
    for _ in range(1200):
        env.reset()
        good += env.good
        starts[env.place] += 1
    assert good.tolist() == pytest.approx([600] * 4, abs=4 * np.sqrt(300))
    assert not starts[:, 2].any()
    assert starts[:, :2].ravel().tolist() == pytest.approx([200] * 6, abs=4 * np.sqrt(200))


@pytest.mark.parametrize("distance", [0, 3, 9])
def test_the_sensor_is_right_as_often_as_stated(distance: int) -> None:
    env = RockSample(11, 1)
    env.reset(seed=0)
    env.rocks, env.place = [(0, 0)], (distance, 0)
    right = 0
    for count in range(900):
        env.good = [count % 2 == 0]
        reading = env.step(SAMPLE + 1)[0][-1]
        assert abs(reading) == 1.0
        right += (reading > 0) == env.good[0]
    chance = (1 + 2 ** (-distance / 20)) / 2
    assert right / 900 == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 900) + 1e-12)


def test_readings_are_shown_once_and_of_the_checked_rock_only() -> None:
    env = RockSample(5, 3)
    env.reset(seed=0)
    seen = env.step(SAMPLE + 2)[0]
    assert seen[10] == seen[12] == 0.0 != seen[11]
    assert not env.step(SAMPLE)[0][10:].any()


def test_a_good_rock_pays_once_and_is_bad_then() -> None:
    env = RockSample(5, 1)
    env.reset(seed=0)
    env.place, env.good = env.rocks[0], [True]
    assert [env.step(SAMPLE)[1] for _ in range(3)] == [10.0, -10.0, -10.0]
    env.place = next((row, 0) for row in range(5) if (row, 0) not in env.rocks)
    assert env.step(SAMPLE)[1] == 0.0


def test_moves_stop_at_walls_and_the_last_column_is_the_way_out() -> None:
    env = RockSample(4, 1)
    env.reset(seed=0)
    env.place = (0, 0)
    assert [env.step(move)[1:4] for move in (NORTH, WEST)] == [(0.0, False, False)] * 2 and env.place == (0, 0)
    env.step(SOUTH)
    assert env.place == (1, 0)
    env.step(EAST)
    env.step(EAST)
    seen, reward, terminated, truncated, _ = env.step(EAST)
    assert (reward, terminated, truncated) == (10.0, True, False)
    assert np.flatnonzero(seen).tolist() == [1, 7]


def test_the_player_collects_all_that_is_good() -> None:
    env = RockSample()
    env.reset(seed=0)
    returns, good = [], []
    for _ in range(200):
        env.reset()
        good.append(sum(env.good))
        total, ended = 0.0, False
        while not ended:
            _, reward, ended, _, _ = env.step(env.oracle_action())
            total += reward
        returns.append(total)
    assert returns == [10.0 * (1 + number) for number in good]


def test_discounted_rewards_add_up_to_the_discounted_return() -> None:
    plain, discounted = RockSample(), RockSample(discount=0.99)
    plain.reset(seed=3)
    discounted.reset(seed=3)
    step, ended = 0, False
    while not ended:
        action = plain.oracle_action()
        _, reward, ended, _, _ = plain.step(action)
        assert discounted.step(action)[1] == pytest.approx(0.99**step * reward)
        step += 1


def test_idle_episodes_are_truncated_after_a_thousand_steps() -> None:
    env = RockSample(4, 1)
    env.reset(seed=0)
    ends = [env.step(WEST)[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(WEST)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RockSample(1), "size must be at least 2, got 1"),
        (lambda: RockSample(2, 3), "num_rocks must be at most 2, got 3"),
        (lambda: RockSample(layout=-1), "layout must be at least 0, got -1"),
        (lambda: RockSample(discount=1.1), "discount must be finite"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_action_out_of_range_is_refused() -> None:
    env = RockSample(4, 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be in 0\.\.6, got 7"):
        env.step(7)


def test_text_shows_rover_and_rocks() -> None:
    env = RockSample(2, 2, render_mode="ansi")
    env.reset(seed=0)
    env.place, env.rocks, env.good = (0, 0), [(0, 0), (1, 0)], [True, False]
    assert env.render() == "A|\n-|\n"
    assert play(env, lambda _: env.oracle_action(), seed=1) >= 10.0
