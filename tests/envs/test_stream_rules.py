"""What each stream task shows and asks for."""

import itertools
import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.envs.episodes import ScriptedChance, play
from xlstm_rl.envs import (
    Copy,
    Cycle,
    KeyValueRecall,
    NearestSoFar,
    NoisyEvidence,
    Overwrite,
    Parity,
    RepeatFirst,
    RepeatPrevious,
    ShellGame,
    SymbolStreamEnv,
    cue_recall,
)
from xlstm_rl.envs.noisy_evidence import majority_accuracies


def test_repeat_first_asks_for_the_symbol_of_the_first_observation() -> None:
    env = RepeatFirst(6, 5)
    for seed in range(20):
        cue = int(env.reset(seed=seed)[0][:-1].argmax())
        for _ in range(5):
            env.step(0)
        assert env.oracle_action() == cue


def test_cue_recall_is_blank_between_the_cue_and_the_question() -> None:
    env = cue_recall(3, 4)
    cue, _ = env.reset(seed=0)
    later = [env.step(0)[0].tolist() for _ in range(4)]
    assert cue.sum() == 1.0 and cue[-1] == 0.0
    assert later == [[0.0] * 5] * 3 + [[0.0] * 4 + [1.0]]


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_repeat_previous_asks_for_the_symbol_of_lag_steps_ago(lag: int) -> None:
    env = RepeatPrevious(lag, 20, 4)
    seen = [env.reset(seed=lag)[0]]
    for step in range(20):
        if step >= lag:
            assert env.oracle_action() == int(seen[step - lag][:-1].argmax())
        seen.append(env.step(0)[0])


def test_parity_asks_whether_the_ones_so_far_are_odd() -> None:
    env = Parity(12)
    bits = [int(env.reset(seed=0)[0][1])]
    for _ in range(11):
        bits.append(int(env.step(0)[0][1]))
        assert env.oracle_action() == sum(bits) % 2


@pytest.mark.parametrize("num_keys", [6, 9])
def test_key_value_recall_asks_every_key_once_for_the_value_shown_with_it(num_keys: int) -> None:
    env = KeyValueRecall(6, 3, num_keys)
    seen = env.reset(seed=4)[0]
    pairs: dict[int, int] = {}
    for _ in range(6):
        pairs[int(seen[:num_keys].argmax())] = int(seen[num_keys:-1].argmax())
        seen = env.step(0)[0]
    asked = []
    for _ in range(6):
        asked.append(int(seen[:num_keys].argmax()))
        assert not seen[num_keys:-1].any()
        assert env.oracle_action() == pairs[asked[-1]]
        seen = env.step(0)[0]
    assert len(pairs) == 6 and sorted(asked) == sorted(pairs)


def test_key_value_recall_asks_in_an_order_of_its_own_and_values_are_independent() -> None:
    env = KeyValueRecall(2, 4)
    env.reset(seed=0)
    turned = equal = 0
    for _ in range(2000):
        seen = [env.reset()[0]] + [env.step(0)[0] for _ in range(3)]
        turned += seen[0][:2].tolist() != seen[2][:2].tolist()
        equal += seen[0][2:6].tolist() == seen[1][2:6].tolist()
    assert turned == pytest.approx(1000, abs=4 * math.sqrt(500))
    assert equal == pytest.approx(500, abs=4 * math.sqrt(375))


def test_rare_keys_come_up_as_seldom_as_their_weights_say() -> None:
    env = KeyValueRecall(1, 2, 4, key_exponent=1.0)
    env.reset(seed=0)
    counts = sum(env.reset()[0][:4] for _ in range(4000))
    expected = 4000 / np.arange(1, 5) / sum(1 / key for key in range(1, 5))
    assert np.abs(counts - expected).max() < 4 * math.sqrt(1000)


def test_copy_asks_for_all_symbols_in_their_order() -> None:
    env = Copy(5, 7)
    seen = [env.reset(seed=0)[0]] + [env.step(0)[0] for _ in range(4)]
    env.step(0)
    said = []
    for _ in range(5):
        said.append(env.oracle_action())
        env.step(0)
    assert said == [int(symbol[:-1].argmax()) for symbol in seen]


def test_overwrite_asks_for_the_value_written_last() -> None:
    env = Overwrite(4, 15, 5)
    for seed in range(10):
        seen = env.reset(seed=seed)[0]
        now: dict[int, int] = {}
        asked = []
        for _ in range(15):
            now[int(seen[:4].argmax())] = int(seen[4:-1].argmax())
            seen = env.step(0)[0]
        for _ in range(4):
            asked.append(int(seen[:4].argmax()))
            assert env.oracle_action() == now[asked[-1]] and not seen[4:-1].any()
            seen = env.step(0)[0]
        assert sorted(asked) == [0, 1, 2, 3]


def test_nearest_so_far_asks_for_the_nearest_of_the_items_before() -> None:
    env = NearestSoFar(20, 5, 3)
    target = env.reset(seed=1)[0]
    assert not target[3:].any()
    best, value = np.inf, -1
    for step in range(1, 22):
        seen = env.step(0)[0]
        if step > 1:
            assert seen[-1] == 1.0 and env.oracle_action() == value
        distance = float(np.linalg.norm(seen[:3] - target[:3]))
        if distance < best:
            best, value = distance, int(seen[3:-1].argmax())
    assert not seen[:-1].any()


def test_cycle_asks_where_the_moves_lead() -> None:
    env = Cycle(5, 30)
    place = int(env.reset(seed=2)[0][:5].argmax())
    for _ in range(30):
        seen = env.step(0)[0]
        assert not seen[:5].any()
        place = (place + int(seen[5:8].argmax()) - 1) % 5
        assert env.oracle_action() == place


def test_shell_game_asks_where_the_ball_went() -> None:
    env = ShellGame(4, 30)
    permutations = list(itertools.permutations(range(4)))
    ball = int(env.reset(seed=2)[0][:4].argmax())
    for _ in range(30):
        seen = env.step(0)[0]
        ball = permutations[int(seen[4:-1].argmax())][ball]
        assert env.oracle_action() == ball


@pytest.mark.parametrize(("num_samples", "accuracy"), [(1, 0.8), (5, 0.7), (9, 0.6), (3, 1.0)])
def test_optimal_return_of_noisy_evidence_is_that_of_the_best_use_of_all_copies(
    num_samples: int, accuracy: float
) -> None:
    env = NoisyEvidence(num_samples, accuracy)
    chance = ScriptedChance()
    weights: dict[bytes, NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))
    oracle = 0.0
    for _ in chance.outcomes():
        frames, answers, best, _ = env.episodes(chance)
        weights[frames.tobytes()][answers[0, -1]] += chance.probability()
        oracle += chance.probability() * (best[0, -1] == answers[0, -1])
    assert sum(weight.max() for weight in weights.values()) == pytest.approx(env.facts.optimal_return, abs=1e-12)
    assert oracle == pytest.approx(env.facts.optimal_return, abs=1e-12)


@pytest.mark.parametrize("accuracy", [0.501, 0.65, 0.8, 0.999, 1.0])
def test_majorities_are_right_as_often_as_the_binomial_distribution_says(accuracy: float) -> None:
    found, right = majority_accuracies(400, accuracy), Fraction(accuracy)
    assert len(found) == 401
    for n in (0, 1, 2, 3, 20, 21, 63, 64, 65, 66, 335, 400):
        chances = [math.comb(n, k) * right**k * (1 - right) ** (n - k) for k in range(n + 1)]
        exact = sum(chances[n // 2 + 1 :]) + (chances[n // 2] / 2 if n % 2 == 0 else 0)
        assert found[n] == pytest.approx(float(exact), abs=1e-12)


def test_bounds_of_short_episodes_keep_the_last_digit_that_records_were_made_with() -> None:
    terms = [math.comb(21, right) * 0.65**right * (1.0 - 0.65) ** (21 - right) for right in range(11, 22)]
    assert NoisyEvidence(21, 0.65).facts.optimal_return == math.fsum(terms)


def test_long_episodes_have_bounds_too() -> None:
    # right minus wrong copies, in units of the root of their number: nearly normal with mean 2 and deviation 1
    assert NoisyEvidence(100_001, 0.5 + 1 / math.sqrt(100_001)).facts.optimal_return == pytest.approx(0.97725, abs=1e-5)
    assert NoisyEvidence(20_001, 0.8).facts.optimal_return == pytest.approx(1.0, abs=1e-12)


def test_oracle_of_noisy_evidence_is_right_as_often_as_stated() -> None:
    env = NoisyEvidence()
    env.reset(seed=0)
    returns = [play(env, lambda _: env.oracle_action()) for _ in range(3000)]
    assert np.mean(returns) == pytest.approx(env.facts.optimal_return, abs=4 * 0.5 / math.sqrt(3000))


@pytest.mark.parametrize("size", ["first", "previous", "parity"])
def test_symbols_are_uniform_and_independent_of_the_one_before(size: str) -> None:
    env: SymbolStreamEnv = {"first": RepeatFirst, "previous": RepeatPrevious, "parity": Parity}[size]()
    env.reset(seed=0)
    num_symbols = (env.observation_space.shape or (0,))[0] - 1
    counts = np.zeros((num_symbols, num_symbols))
    for _ in range(300):
        seen = [env.reset()[0]] + [env.step(0)[0] for _ in range(env.facts.horizon - 1)]
        symbols = np.argmax(np.array(seen)[:, :-1], axis=1)
        np.add.at(counts, (symbols[:-1], symbols[1:]), 1)
    expected = counts.sum() / counts.size
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)
