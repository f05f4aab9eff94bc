"""Concentration: its rules, what it shows, and its ceilings."""

import itertools
from functools import cache

import gymnasium as gym
import numpy as np
import pytest

from xlstm_rl.envs import Pairs
from xlstm_rl.envs.concentration import BestPlay, pairs_found_blindly

Cards = tuple[int | None, ...]


def best_value(num_pairs: int, num_turns: int) -> float:
    """Expected pairs of best play, by search over everything that an agent can do and see."""
    num_cards = 2 * num_pairs
    decks = sorted(set(itertools.permutations([card // 2 for card in range(num_cards)])))

    @cache
    def value(seen: Cards, taken: frozenset[int], up: tuple[int, ...], turns: int) -> float:
        if turns == 0:
            return 0.0
        if len(up) == 2:
            found = seen[up[0]] == seen[up[1]]
            return found + value(seen, taken | set(up) if found else taken, (), turns - 1)
        # Passing the rest of a turn, as by a card that turns nothing over.
        values = [value(seen, taken, (), turns - 1)]
        possible = [deck for deck in decks if all(face in (None, deck[card]) for card, face in enumerate(seen))]
        for card in set(range(num_cards)) - taken - set(up):
            shown = [seen[:card] + (deck[card],) + seen[card + 1 :] for deck in possible]
            weights = {after: shown.count(after) / len(shown) for after in set(shown)}
            values.append(sum(weight * value(after, taken, (*up, card), turns) for after, weight in weights.items()))
        return max(values)

    return value((None,) * num_cards, frozenset(), (), num_turns)


def play(env: Pairs, generator: np.random.Generator | None) -> float:
    """Return of the oracle, or of uniform picks among cards on the table that are down."""
    seen, _ = env.reset()
    total, ended = 0.0, False
    while not ended:
        action = env.oracle_action()
        if generator is not None:
            faces = seen[env.num_cards : -3].reshape(env.num_cards, -1)
            down = np.flatnonzero((seen[: env.num_cards] == 0) & ~faces.any(axis=1))
            action = int(generator.choice(down)) if len(down) else 0
        seen, reward, ended, _, _ = env.step(action)
        total += reward
    return total


@pytest.mark.parametrize(("num_pairs", "num_turns"), [(2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2)])
def test_the_optimum_is_that_of_a_search_over_all_play(num_pairs: int, num_turns: int) -> None:
    assert BestPlay(num_pairs, num_turns).optimal_pairs == pytest.approx(best_value(num_pairs, num_turns), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_turns", [3, 4, 5])
def test_the_optimum_of_three_pairs_is_that_of_a_search_over_all_play(num_turns: int) -> None:
    assert BestPlay(3, num_turns).optimal_pairs == pytest.approx(best_value(3, num_turns), abs=1e-12)


@pytest.mark.parametrize(("num_pairs", "num_turns"), [(2, 2), (4, 4), (4, 6), (4, 8), (5, 7)])
def test_the_oracle_collects_the_optimal_return(num_pairs: int, num_turns: int) -> None:
    env = Pairs(num_pairs, num_turns)
    env.reset(seed=0)
    returns = [play(env, None) for _ in range(600)]
    tolerance = 4 * float(np.std(returns)) / np.sqrt(600) + 1e-12
    assert np.mean(returns) == pytest.approx(env.facts.optimal_return, abs=tolerance)


@pytest.mark.parametrize("num_pairs", [2, 4])
def test_uniform_picks_collect_the_memoryless_return(num_pairs: int) -> None:
    env = Pairs(num_pairs)
    env.reset(seed=1)
    generator = np.random.default_rng(1)
    returns = [play(env, generator) for _ in range(800)]
    assert np.mean(returns) == pytest.approx(env.facts.memoryless_return, abs=4 * np.std(returns) / np.sqrt(800))


@pytest.mark.parametrize("num_turns", [1, 2, 5])
def test_no_other_memoryless_picks_beat_uniform_ones_with_two_pairs(num_turns: int) -> None:
    # Four cards can be matched in three ways; all that counts is with which chance a turn tries each.
    tries = np.random.default_rng(0).dirichlet(np.ones(3), size=3000)
    found_in_turn = [(1 - tries) ** turn * tries for turn in range(num_turns)]
    # The last pair is found in the turn after.
    pairs = sum(found * (2 if turn + 1 < num_turns else 1) for turn, found in enumerate(found_in_turn))
    assert np.mean(pairs, axis=1).max() <= pairs_found_blindly(2, num_turns) + 1e-12


def test_twice_as_many_turns_as_pairs_suffice() -> None:
    for num_pairs in (2, 4, 7):
        assert Pairs(num_pairs).facts.optimal_return == pytest.approx(1.0, abs=1e-12)


def test_the_observation_shows_taken_cards_cards_that_are_up_and_the_phase() -> None:
    env = Pairs(2, 5)
    seen, _ = env.reset(seed=0)
    first = env.faces.index(0)
    partner = env.faces.index(0, first + 1)
    other = env.faces.index(1)

    def shown(cards: dict[int, int], taken: set[int], phase: int) -> list[float]:
        expected = np.zeros(4 + 8 + 3)
        expected[list(taken)] = 1.0
        for card, face in cards.items():
            expected[4 + 2 * card + face] = 1.0
        expected[12 + phase] = 1.0
        return list(expected)

    assert seen.tolist() == shown({}, set(), 0)
    assert env.step(first)[0].tolist() == shown({first: 0}, set(), 1)
    assert env.step(other)[0].tolist() == shown({first: 0, other: 1}, set(), 2)
    assert env.step(0)[0].tolist() == shown({}, set(), 0)
    env.step(first)
    seen, reward, *_ = env.step(partner)
    assert reward == 0.5 and seen.tolist() == shown({first: 0, partner: 0}, set(), 2)
    assert env.step(0)[0].tolist() == shown({}, {first, partner}, 0)


def test_a_card_that_is_up_or_taken_turns_nothing_over() -> None:
    env = Pairs(2, 5)
    env.reset(seed=0)
    first, partner = (card for card in range(4) if env.faces[card] == 0)
    env.step(first)
    seen, reward, *_ = env.step(first)
    assert reward == 0.0 and seen[4:12].sum() == 1.0 and seen[14] == 1.0
    env.step(0)
    env.step(first)
    env.step(partner)
    env.step(0)
    seen, reward, *_ = env.step(first)
    assert reward == 0.0 and not seen[4:12].any() and seen[13] == 1.0


def test_the_last_pair_ends_the_episode_with_success() -> None:
    env = Pairs(3)
    env.reset(seed=0)
    info: dict[str, bool] = {}
    total = 0.0
    for _ in range(env.facts.horizon):
        seen, reward, ended, truncated, info = env.step(env.oracle_action())
        total += reward
        assert not truncated
        if ended:
            break
    assert info == {"is_success": True} and total == pytest.approx(1.0) and not seen.any()


def test_the_last_turn_ends_the_episode_without_success() -> None:
    env = Pairs(2, 3)
    env.reset(seed=0)
    results = [env.step(0) for _ in range(8)]
    assert [result[2] for result in results] == [False] * 7 + [True]
    assert results[-1][4] == {"is_success": False}
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


def test_decks_are_uniform() -> None:
    env = Pairs(2)
    env.reset(seed=0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        env.reset()
        counts[tuple(env.faces)] = counts.get(tuple(env.faces), 0) + 1
    assert len(counts) == 6
    assert all(count == pytest.approx(500, abs=4.5 * np.sqrt(500 * 5 / 6)) for count in counts.values())


def test_render_draws_the_table() -> None:
    env = Pairs(2, render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == "turn 1/4: # # # #\n"
    env.step(2)
    assert env.render() == f"turn 1/4: # # {env.faces[2]} #\n"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_pairs": 1}, "num_pairs must be at least 2, got 1"),
        ({"num_turns": 0}, "num_turns must be at least 1, got 0"),
        ({"render_mode": "human"}, "render_mode must be None or one of .*got 'human'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(parameters: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pairs(**parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [-1, 8])
def test_an_action_out_of_range_is_refused(action: int) -> None:
    env = Pairs()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"action must be in 0\.\.7, got {action}"):
        env.step(action)
