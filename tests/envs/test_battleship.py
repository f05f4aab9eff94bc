"""Battleship: its fleet, its shots, its masks and its scripted player."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.envs.episodes import play
from xlstm_rl.envs import Battleship


def test_fleets_have_the_stated_ships_and_both_directions() -> None:
    env = Battleship()
    env.reset(seed=0)
    rows = 0
    for _ in range(300):
        env.reset()
        assert env.fleet.sum() == 14
    lone = Battleship(6, (4,))
    lone.reset(seed=0)
    cells = np.zeros(36)
    for _ in range(3000):
        lone.reset()
        grid = lone.fleet.reshape(6, 6)
        cells += lone.fleet
        rows += int(grid.any(axis=1).sum() == 1)
    assert rows == pytest.approx(1500, abs=4 * np.sqrt(750))
    # of 18 places along rows, each with chance 1/36, that of a corner covers it; likewise along columns
    assert cells[0] == pytest.approx(3000 / 18, abs=4 * np.sqrt(3000 / 18))


def test_a_shot_tells_whether_it_hit_something_new() -> None:
    env = Battleship(4, (2,))
    env.reset(seed=0)
    ship, water = np.flatnonzero(env.fleet), np.flatnonzero(~env.fleet)
    seen = [env.step(cell)[:4] for cell in (water[0], ship[0], ship[0], ship[1])]
    assert [float(part[0][0]) for part in seen] == [0.0, 1.0, 0.0, 1.0]
    assert [part[1] for part in seen] == [-1.0, -1.0, -1.0, 16.0]
    assert [part[2:] for part in seen] == [(False, False)] * 3 + [(True, False)]


def test_masks_allow_what_was_not_shot_at() -> None:
    env = Battleship(4, (2,))
    env.reset(seed=0)
    assert env.action_masks().all()
    env.step(3)
    assert np.flatnonzero(~env.action_masks()).tolist() == [3]
    env.reset()
    assert env.action_masks().all()


def test_masked_shots_at_random_need_as_many_as_the_last_of_as_many_cells_drawn() -> None:
    env = Battleship()
    generator = np.random.default_rng(0)
    env.reset(seed=0)
    returns = [play(env, lambda _: int(generator.choice(np.flatnonzero(env.action_masks())))) for _ in range(400)]
    # the last of 14 among 100 in random order comes at 14 * 101 / 15
    expected = 100.0 + 1.0 - 14 * 101 / 15
    assert np.mean(returns) == pytest.approx(expected, abs=4 * np.std(returns) / 20)


def test_the_player_needs_about_half_the_grid() -> None:
    env = Battleship()
    env.reset(seed=0)
    returns = [play(env, lambda _: env.oracle_action()) for _ in range(60)]
    assert np.mean(returns) > 45.0


def test_the_player_never_shoots_twice_and_aims_beside_a_hit() -> None:
    env = Battleship(5, (3, 2))
    for seed in range(20):
        env.reset(seed=seed)
        ended, before = False, -1
        while not ended:
            cell = env.oracle_action()
            assert env.action_masks()[cell]
            seen, _, ended, _, _ = env.step(cell)
            if before >= 0 and (env.shots == 2).sum() == 1 and env.shots[before] == 2:
                assert abs(cell // 5 - before // 5) + abs(cell % 5 - before % 5) <= 2
            before = cell if seen[0] else -1


def test_idle_episodes_are_truncated_after_a_thousand_steps() -> None:
    env = Battleship(3, (2,))
    env.reset(seed=0)
    cell = int(np.flatnonzero(~env.fleet)[0])
    ends = [env.step(cell)[2:] for _ in range(1000)]
    assert ends[-2:] == [(False, False, {}), (False, True, {"is_success": False})]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(cell)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Battleship(0), "size must be at least 1, got 0"),
        (lambda: Battleship(4, (5,)), "each of ships must be at most 4, got 5"),
        (lambda: Battleship(4, ()), "ships must name at least one length"),
        (lambda: Battleship(3, (3, 3, 3)), "may leave no place for one of 3 on a grid of 3"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_action_out_of_range_is_refused() -> None:
    env = Battleship(3, (2,))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be in 0\.\.8, got 9"):
        env.step(9)


def test_text_shows_shots_and_ships() -> None:
    env = Battleship(2, (2,), render_mode="ansi")
    env.reset(seed=0)
    env.fleet = np.array([True, True, False, False])
    env.step(0)
    env.step(2)
    assert env.render() == "X#\no.\n"
