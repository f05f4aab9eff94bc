"""The endless T-maze: its rules, its oracle and its ceilings."""

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.envs.episodes import play
from xlstm_rl.envs import EndlessTMaze

FORWARD, LEFT, RIGHT = range(3)
SETTINGS = [(1, 5, "fixed"), (5, 10, "fixed"), (3, 5, "uniform"), (10, 10, "uniform"), (2, 1, "uniform")]


def walk_to_the_end(env: EndlessTMaze) -> None:
    for _ in range(env.ends[env.corridor]):
        env.step(FORWARD)


def value_of_policy(num_corridors: int, length: int, forward: NDArray[np.float64], *, uniform: bool) -> float:
    """Exact return of a policy that walks on with these chances by cell and else turns to a fair side.

    Without the step limit.
    """
    returns = []
    for end in range(1, length + 1) if uniform else [length]:
        cost = 0.01 * sum(1.0 / forward[cell] for cell in range(end))
        returns.append((cost, (1.0 - forward[end]) / 2))
    value = 0.0
    for _ in range(num_corridors):
        value = float(np.mean([-cost + passed * (1.0 + value) - (1.0 - passed) for cost, passed in returns]))
    return value


@pytest.mark.parametrize(("corridors", "length", "lengths"), SETTINGS)
def test_the_oracle_passes_every_corridor_and_collects_the_optimum(corridors: int, length: int, lengths: str) -> None:
    env = EndlessTMaze(corridors, length, lengths)
    env.reset(seed=0)
    returns = [play(env, lambda _: env.oracle_action()) for _ in range(400)]
    assert env.corridor == corridors
    assert np.mean(returns) == pytest.approx(env.facts.optimal_return, abs=4 * np.std(returns) / 20 + 1e-9)


def test_the_oracle_needs_no_more_than_what_was_seen() -> None:
    """Two mazes alike but for the hidden end are walked alike up to the end."""
    env, longer = EndlessTMaze(1, 8, "uniform"), EndlessTMaze(1, 8, "uniform")
    env.reset(seed=0)
    longer.reset(seed=0)
    env.ends, longer.ends = [3], [8]
    for _ in range(5):
        action = env.oracle_action()
        assert action == longer.oracle_action()
        np.testing.assert_array_equal(env.step(action)[0], longer.step(action)[0])
    assert env.oracle_action() == longer.oracle_action() == env.turns[0]


@pytest.mark.parametrize(("corridors", "length"), [(1, 3), (4, 3), (3, 10)])
def test_no_other_chances_of_walking_on_beat_the_stated_memoryless_return(corridors: int, length: int) -> None:
    stated = EndlessTMaze(corridors, length, "uniform").facts.memoryless_return
    grid = np.linspace(0.02, 1.0, 50)
    # turning at the start is never of use, nor is walking on at the last cell
    best = np.array([1.0, *[0.5] * (length - 1), 0.0])
    for cell in [*range(1, length)] * 4:
        values = [
            value_of_policy(corridors, length, np.array([*best[:cell], f, *best[cell + 1 :]]), uniform=True)
            for f in grid
        ]
        best[cell] = grid[int(np.argmax(values))]
    found = value_of_policy(corridors, length, best, uniform=True)
    assert found <= stated + 1e-9
    assert found == pytest.approx(stated, abs=0.002)


@pytest.mark.parametrize("corridors", [1, 5])
def test_the_memoryless_return_with_fixed_lengths_is_that_of_blind_turns(corridors: int) -> None:
    stated = EndlessTMaze(corridors, 7).facts.memoryless_return
    walks = np.array([*[1.0] * 7, 0.0])
    assert value_of_policy(corridors, 7, walks, uniform=False) == pytest.approx(stated, abs=1e-12)
    hesitates = np.array([*[0.9] * 7, 0.0])
    assert value_of_policy(corridors, 7, hesitates, uniform=False) < stated


def test_blind_turns_collect_the_memoryless_return() -> None:
    env = EndlessTMaze(5, 10)
    env.reset(seed=0)
    generator = np.random.default_rng(0)

    def blind(seen: NDArray[np.float32]) -> int:
        return FORWARD if seen[0] < 1.0 else LEFT + int(generator.integers(2))

    returns = [play(env, blind) for _ in range(2000)]
    assert np.mean(returns) == pytest.approx(env.facts.memoryless_return, abs=4 * np.std(returns) / np.sqrt(2000))


def test_the_sign_is_shown_in_the_first_cell_of_every_corridor() -> None:
    env = EndlessTMaze(2, 4)
    seen, _ = env.reset(seed=0)
    for corridor in range(2):
        sign = [0.0, float(env.turns[corridor] == LEFT), float(env.turns[corridor] == RIGHT)]
        assert seen.tolist() == sign
        assert env.step(LEFT)[0].tolist() == sign
        places = [env.step(FORWARD)[0].tolist() for _ in range(4)]
        assert places == [[0.25, 0.0, 0.0], [0.5, 0.0, 0.0], [0.75, 0.0, 0.0], [1.0, 0.0, 0.0]]
        seen = env.step(env.turns[corridor])[0]
    assert not seen.any()


@pytest.mark.parametrize("wrong", ["forward", "other side"])
def test_anything_but_the_named_turn_at_a_junction_ends_the_episode(wrong: str) -> None:
    env = EndlessTMaze(3, 2)
    env.reset(seed=1)
    walk_to_the_end(env)
    action = FORWARD if wrong == "forward" else LEFT + RIGHT - env.turns[0]
    assert env.step(action)[1:] == (-1.0, True, False, {"is_success": False})


def test_rewards_are_those_documented() -> None:
    env = EndlessTMaze(1, 2)
    env.reset(seed=0)
    assert env.step(RIGHT)[1] == env.step(FORWARD)[1] == env.step(FORWARD)[1] == -0.01
    assert env.step(env.turns[0])[1:] == (1.0, True, False, {"is_success": True})


def test_the_last_step_before_the_limit_still_counts() -> None:
    env = EndlessTMaze(1, 1)
    env.reset(seed=0)
    for _ in range(env.facts.horizon - 2):
        env.step(LEFT)
    env.step(FORWARD)
    assert env.step(env.turns[0])[1:] == (1.0, True, False, {"is_success": True})
    env.reset()
    ends = [env.step(LEFT)[2:] for _ in range(env.facts.horizon)]
    assert ends[-1] == (False, True, {"is_success": False}) and not any(any(end[:2]) for end in ends[:-1])


def test_signs_and_lengths_are_independent_and_uniform() -> None:
    env = EndlessTMaze(4, 3, "uniform")
    env.reset(seed=0)
    counts = dict.fromkeys(itertools.product((LEFT, RIGHT), (1, 2, 3)), 0)
    for _ in range(1500):
        env.reset()
        for pair in zip(env.turns, env.ends, strict=True):
            counts[pair] += 1
    assert all(count == pytest.approx(1000, abs=4 * np.sqrt(1000)) for count in counts.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EndlessTMaze(0), "num_corridors must be at least 1, got 0"),
        (lambda: EndlessTMaze(1, 101), "corridor_length must be at most 100, got 101"),
        (lambda: EndlessTMaze(lengths="random"), r"lengths must be one of .*'uniform'.* got 'random'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_actions_and_steps_past_the_end_are_refused() -> None:
    env = EndlessTMaze(1, 1)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(FORWARD)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be in 0\.\.2, got 3"):
        env.step(3)
    walk_to_the_end(env)
    env.step(FORWARD)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(FORWARD)


def test_text_shows_the_sign_and_the_agent() -> None:
    env = EndlessTMaze(2, 3, render_mode="ansi")
    env.reset(seed=0)
    env.step(FORWARD)
    sign = "<" if env.turns[0] == LEFT else ">"
    assert env.render() == f"corridor 1/2: {sign}.A..\n"
