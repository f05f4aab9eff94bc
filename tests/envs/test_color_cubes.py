"""Color-Cubes: its rules, what it shows, its oracle and its ceilings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.envs.episodes import play
from xlstm_rl.envs import ColorCubes
from xlstm_rl.envs.color_cubes import taken_on_tour

UP, DOWN, LEFT, RIGHT, TAKE = range(5)
LEVELS: dict[str, dict[str, Any]] = {
    "trivial": {"num_cubes": 1, "num_phases": 1},
    "medium": {},
    "extreme": {"hide_colors": True},
    "crowded": {"grid": 3, "num_cubes": 7, "teleport": 0.8, "hide_colors": True},
}
each_level = pytest.mark.parametrize("level", LEVELS)


class Reader:
    """Perfect memory of what was shown, and nothing else."""

    def __init__(self, env: ColorCubes) -> None:
        self.grid, self.num_cubes = env.grid, env.num_cubes
        self.agent, self.target = -1, -1
        self.cubes = [-1] * env.num_cubes

    def read(self, seen: NDArray[np.float32]) -> None:
        grid, cubes = self.grid, self.num_cubes
        places = seen[: 2 * grid * (cubes + 1)].reshape(cubes + 1, 2, grid)
        occupied = set(np.flatnonzero(seen[places.size : places.size + grid**2]).tolist())
        cells = [int(row.argmax()) * grid + int(column.argmax()) if row.any() else -1 for row, column in places]
        self.agent = cells[0]
        if cells[1] >= 0:
            self.cubes = cells[1:]
        elif occupied:
            (moved,) = [color for color, cell in enumerate(self.cubes) if cell not in occupied]
            (self.cubes[moved],) = occupied - set(self.cubes)
        if seen[-cubes:].any():
            self.target = int(seen[-cubes:].argmax())


@each_level
def test_the_oracle_always_succeeds(level: str) -> None:
    env = ColorCubes(**LEVELS[level])
    env.reset(seed=0)
    assert {play(env, lambda _: env.oracle_action()) for _ in range(200)} == {env.facts.optimal_return}


@each_level
def test_what_is_shown_is_enough_to_know_all_that_matters(level: str) -> None:
    env = ColorCubes(**LEVELS[level])
    seen, _ = env.reset(seed=0)
    generator = np.random.default_rng(0)
    for _ in range(30):
        reader, ended = Reader(env), False
        while not ended:
            reader.read(seen)
            assert (reader.agent, reader.target, reader.cubes) == (env.agent, env.target, env.cubes)
            action = env.oracle_action() if generator.random() < 0.7 else int(generator.integers(5))
            seen, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        seen, _ = env.reset()


def test_between_changes_the_place_of_the_agent_is_all_that_is_shown() -> None:
    env = ColorCubes(teleport=0.0)
    env.reset(seed=0)
    for action in (UP, LEFT, DOWN, RIGHT, TAKE):
        row, column = divmod(env.agent, env.grid)
        seen = env.step(action)[0]
        row, column = divmod(env.agent, env.grid)
        assert np.flatnonzero(seen).tolist() == [row, env.grid + column]


def test_colors_are_hidden_after_the_first_observation_of_extreme() -> None:
    env = ColorCubes(teleport=1.0, hide_colors=True)
    by_color = slice(2 * env.grid, 2 * env.grid * (env.num_cubes + 1))
    seen, _ = env.reset(seed=0)
    assert seen[by_color].sum() == 2 * env.num_cubes
    for _ in range(20):
        seen = env.step(env.oracle_action())[0]
        if env.taken < env.num_phases and seen.any():
            assert not seen[by_color].any()
            assert seen[by_color.stop : by_color.stop + env.grid**2].sum() == env.num_cubes
        else:
            env.reset()


def test_the_cube_asked_for_stays_and_one_other_moves() -> None:
    env = ColorCubes(num_phases=8, teleport=1.0)
    env.reset(seed=0)
    moved = set()
    for _ in range(60):
        target, cubes, taken = env.target, [*env.cubes], env.taken
        wanders = UP if env.agent >= env.grid else DOWN
        env.step(wanders)
        changed = [color for color in range(env.num_cubes) if env.cubes[color] != cubes[color]]
        assert env.taken == taken and len(changed) == 1 and target not in changed
        assert len({*env.cubes, env.agent}) >= env.num_cubes and env.cubes[changed[0]] != env.agent
        moved.update(changed)
    assert moved == set(range(env.num_cubes)) - {env.target}


def test_jumps_come_as_often_as_stated() -> None:
    env = ColorCubes(grid=8, num_phases=8, teleport=0.25)
    env.reset(seed=0)
    jumps = 0
    for step in range(1, 2001):
        before = [*env.cubes]
        _, _, _, truncated, _ = env.step(UP if step % 2 else DOWN)
        jumps += env.cubes != before
        if truncated:
            env.reset()
    assert jumps / 2000 == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))


def test_a_taken_cube_moves_and_another_color_may_be_asked_for() -> None:
    env = ColorCubes(num_phases=400)
    env.reset(seed=0)
    asked = [env.target]
    while len(asked) < 300:
        target, cell = env.target, env.cubes[env.target]
        if env.oracle_action() == TAKE:
            seen, reward, *_ = env.step(TAKE)
            assert reward == 1.0 and env.cubes[target] != cell
            assert seen[-env.num_cubes :].argmax() == env.target
            asked.append(env.target)
        else:
            assert env.step(env.oracle_action())[1] == 0.0
    counts = np.bincount(asked, minlength=env.num_cubes)
    assert counts.tolist() == pytest.approx([100] * 3, abs=4 * np.sqrt(100))


def test_walls_and_wrong_takes_cost_a_step_only() -> None:
    env = ColorCubes(grid=4, teleport=0.0)
    env.reset(seed=0)
    env.agent = 0
    cubes = [*env.cubes]
    env.cubes[env.target] = 15
    for action in (UP, LEFT, TAKE):
        _, reward, terminated, truncated, _ = env.step(action)
        assert (env.agent, reward, terminated, truncated) == (0, 0.0, False, False)
    assert env.cubes[env.target] == 15 and len(cubes) == len(env.cubes)


@each_level
def test_idle_episodes_are_truncated_at_the_limit(level: str) -> None:
    env = ColorCubes(**LEVELS[level])
    env.reset(seed=0)
    ends: list[tuple[bool, bool]] = []
    while not ends or ends[-1] == (False, False):
        ends.append(env.step(UP)[2:4])
    assert len(ends) == env.facts.horizon and ends[-1] == (False, True)


@pytest.mark.parametrize("size", [(6, 1, 1), (6, 4, 4), (4, 2, 3)])
def test_a_search_by_place_alone_collects_about_the_stated_memoryless_return(size: tuple[int, int, int]) -> None:
    """The statement takes cubes for equally likely everywhere; by play, the best chance of trying finds as many."""
    env = ColorCubes(*size)
    generator = np.random.default_rng(0)
    env.reset(seed=0)

    def search(seen: NDArray[np.float32], trying: float) -> int:
        """Around the grid: down the first column, back up in winding rows."""
        if generator.random() < trying:
            return TAKE
        row, column = int(seen[: env.grid].argmax()), int(seen[env.grid : 2 * env.grid].argmax())
        if column == 0:
            return DOWN if row < env.grid - 1 else RIGHT
        if (env.grid - 1 - row) % 2 == 0:
            return RIGHT if column < env.grid - 1 else UP
        if row == 0 and column == 1:
            return LEFT
        return LEFT if column > 1 else UP

    found = [np.mean([play(env, partial(search, trying=t)) for _ in range(1500)]) for t in (0.3, 0.4, 0.5)]
    assert max(found) == pytest.approx(env.facts.memoryless_return, abs=0.06)


def test_a_tour_of_two_cells_is_worked_out_by_hand() -> None:
    # One cell away, two steps: walk on, then try.
    assert taken_on_tour(2, 1, 2) == pytest.approx(0.25)
    assert taken_on_tour(2, 1, 1) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColorCubes(1), "grid must be at least 2, got 1"),
        (lambda: ColorCubes(2, 3), "num_cubes must be at most 2, got 3"),
        (lambda: ColorCubes(num_phases=0), "num_phases must be at least 1, got 0"),
        (lambda: ColorCubes(teleport=1.5), r"teleport must be finite and in 0\.0\.\.1\.0, got 1\.5"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_actions_and_steps_past_the_end_are_refused() -> None:
    env = ColorCubes(num_phases=1)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(UP)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be in 0\.\.4, got 5"):
        env.step(5)
    play(env, lambda _: env.oracle_action())
    with pytest.raises(gym.error.ResetNeeded):
        env.step(UP)


def test_text_shows_the_grid() -> None:
    env = ColorCubes(grid=2, num_cubes=2, render_mode="ansi")
    env.reset(seed=0)
    env.agent, env.cubes, env.target = 0, [1, 3], 1
    assert env.render() == "phase 1/3\nAb\n.C\n"
