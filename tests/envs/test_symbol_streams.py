"""Every stream task: its oracle, its exact memoryless ceiling, its interface."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from xlstm_rl.envs import KeyValueRecall, Parity, RepeatFirst, RepeatPrevious, SymbolStreamEnv, cue_recall

SIZES: dict[str, Callable[[], SymbolStreamEnv]] = {
    "first": RepeatFirst,
    "first_shortest": lambda: RepeatFirst(2, 2),
    "first_long": lambda: RepeatFirst(300, 7),
    "previous": RepeatPrevious,
    "previous_shortest": lambda: RepeatPrevious(1, 2, 2),
    "previous_long_lag": lambda: RepeatPrevious(64, 100, 3),
    "parity": Parity,
    "parity_shortest": lambda: Parity(2),
    "parity_long": lambda: Parity(200),
    "recall": KeyValueRecall,
    "recall_one_pair": lambda: KeyValueRecall(1, 2),
    "recall_many_keys": lambda: KeyValueRecall(16, 5, 40),
    "cue": cue_recall,
    "cue_no_delay": lambda: cue_recall(0, 5),
}
SMALL_SIZES: dict[str, Callable[[], SymbolStreamEnv]] = {
    "first": lambda: RepeatFirst(4, 3),
    "first_blank": lambda: RepeatFirst(4, 3, distractors=False),
    "previous": lambda: RepeatPrevious(2, 5, 2),
    "previous_lag_1": lambda: RepeatPrevious(1, 4, 3),
    "parity": lambda: Parity(6),
    "recall": lambda: KeyValueRecall(3, 2),
    "recall_many_keys": lambda: KeyValueRecall(2, 3, 4),
    "cue": lambda: cue_recall(3, 4),
}
each_size = pytest.mark.parametrize("size", SIZES)
each_small_size = pytest.mark.parametrize("size", SMALL_SIZES)


class ScriptedGenerator:
    """Stands in for `np_random` and visits every equally likely outcome, one per episode."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.choices: list[int] = []
        self._position = 0

    def integers(self, n: int, size: int) -> NDArray[np.int64]:
        code = self._choose(n**size)
        return np.array([code // n**place % n for place in range(size)])

    def permutation(self, n: int) -> NDArray[np.int64]:
        code = self._choose(math.factorial(n))
        return np.array(next(itertools.islice(itertools.permutations(range(n)), code, None)))

    def outcomes(self) -> Iterator[None]:
        while True:
            self._position = 0
            yield
            while self.choices and self.choices[-1] + 1 == self.counts[-1]:
                self.choices.pop()
                self.counts.pop()
            if not self.choices:
                return
            self.choices[-1] += 1

    def _choose(self, count: int) -> int:
        if self._position == len(self.choices):
            self.choices.append(0)
            self.counts.append(count)
        self._position += 1
        return self.choices[self._position - 1]


def play(env: gym.Env[Any, Any], policy: Callable[[NDArray[np.float32]], int], *, seed: int | None = None) -> float:
    observation, _ = env.reset(seed=seed)
    total = 0.0
    while True:
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        total += float(reward)
        if terminated or truncated:
            return total


def best_memoryless_return(env: SymbolStreamEnv) -> float:
    """Exact, over all episodes: actions do not change what is shown, so the best policy is best at each observation."""
    generator: Any = ScriptedGenerator()
    env.np_random = generator
    weights: dict[bytes, NDArray[np.float64]] = defaultdict(lambda: np.zeros(env.action_space.n))  # type: ignore[attr-defined]
    num_outcomes = 0
    for _ in generator.outcomes():
        num_outcomes += 1
        observation, _ = env.reset()
        ended = False
        while not ended:
            action = env.oracle_action()
            seen = observation.tobytes()
            observation, reward, ended, _, _ = env.step(action)
            weights[seen][action] += reward
    return float(sum(weight.max() for weight in weights.values())) / num_outcomes


@each_size
def test_the_oracle_reaches_the_optimum(size: str) -> None:
    env = SIZES[size]()
    for seed in range(20):
        assert play(env, lambda _: env.oracle_action(), seed=seed) == pytest.approx(env.facts.optimal_return, abs=1e-12)


@each_small_size
def test_no_memoryless_policy_beats_the_stated_ceiling(size: str) -> None:
    env = SMALL_SIZES[size]()
    assert best_memoryless_return(env) == pytest.approx(env.facts.memoryless_return, abs=1e-12)


@each_size
def test_a_memoryless_table_scores_the_stated_ceiling(size: str) -> None:
    env = SIZES[size]()
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((env.observation_space.shape or (0,))[0])
    num_actions = int(env.action_space.n)  # type: ignore[attr-defined]
    env.reset(seed=0)
    returns = [play(env, lambda seen: int(abs(float(seen @ weights)) * 1000) % num_actions) for _ in range(400)]
    tolerance = 4.5 * max(float(np.std(returns)), 0.02) / math.sqrt(len(returns))
    assert np.mean(returns) == pytest.approx(env.facts.memoryless_return, abs=tolerance)


@each_size
def test_a_uniformly_random_policy_scores_the_memoryless_ceiling(size: str) -> None:
    env = SIZES[size]()
    generator = np.random.default_rng(1)
    env.reset(seed=1)
    num_actions = int(env.action_space.n)  # type: ignore[attr-defined]
    returns = [play(env, lambda _: int(generator.integers(num_actions))) for _ in range(400)]
    tolerance = 4.5 * max(float(np.std(returns)), 0.02) / math.sqrt(len(returns))
    assert np.mean(returns) == pytest.approx(env.facts.memoryless_return, abs=tolerance)


@each_size
def test_an_episode_terminates_exactly_at_its_horizon(size: str) -> None:
    env = SIZES[size]()
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(env.facts.horizon)]
    assert ends == [(False, False)] * (env.facts.horizon - 1) + [(True, False)]


@each_size
def test_success_is_told_at_the_last_step_only_and_needs_every_answer(size: str) -> None:
    env = SIZES[size]()
    num_actions = int(env.action_space.n)  # type: ignore[attr-defined]
    for wrong_last in (False, True):
        env.reset(seed=3)
        infos = []
        for step in range(env.facts.horizon):
            spoil = wrong_last and step == env.facts.horizon - 1
            infos.append(env.step((env.oracle_action() + spoil) % num_actions)[4])
        assert infos == [{}] * (env.facts.horizon - 1) + [{"is_success": not wrong_last}]


@each_size
def test_the_stream_does_not_depend_on_actions(size: str) -> None:
    env = SIZES[size]()
    first = [env.reset(seed=5)[0]] + [env.step(0)[0] for _ in range(env.facts.horizon)]
    second = [env.reset(seed=5)[0]] + [env.step(1)[0] for _ in range(env.facts.horizon)]
    np.testing.assert_array_equal(first, second)


@each_size
def test_the_flag_marks_exactly_the_steps_that_pay(size: str) -> None:
    env = SIZES[size]()
    observation, _ = env.reset(seed=2)
    for _ in range(env.facts.horizon):
        asked = observation[-1] == 1.0
        observation, reward, *_ = env.step(env.oracle_action())
        assert (reward > 0) == asked
    assert not observation.any()


def test_wrong_and_unasked_answers_pay_nothing() -> None:
    env = RepeatFirst(5, 3)
    env.reset(seed=0)
    assert [env.step(0)[1] for _ in range(4)] == [0.0] * 4
    wrong = (env.oracle_action() + 1) % 3
    assert env.step(wrong)[1] == 0.0


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


@pytest.mark.parametrize("size", ["first", "previous", "parity"])
def test_symbols_are_uniform_and_independent_of_the_one_before(size: str) -> None:
    env = SIZES[size]()
    env.reset(seed=0)
    num_symbols = (env.observation_space.shape or (0,))[0] - 1
    counts = np.zeros((num_symbols, num_symbols))
    for _ in range(300):
        seen = [env.reset()[0]] + [env.step(0)[0] for _ in range(env.facts.horizon - 1)]
        symbols = np.argmax(np.array(seen)[:, :-1], axis=1)
        np.add.at(counts, (symbols[:-1], symbols[1:]), 1)
    expected = counts.sum() / counts.size
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


@each_size
def test_returned_observations_are_not_shared(size: str) -> None:
    env = SIZES[size]()
    observation, _ = env.reset(seed=0)
    kept = env.step(0)[0]
    expected = kept.copy()
    observation[:] = 9.0
    env.step(0)
    env.reset()
    np.testing.assert_array_equal(kept, expected)
    assert env.reset(seed=0)[0].max() <= 1.0


def test_render_tells_the_step_as_text() -> None:
    env = KeyValueRecall(2, 3, render_mode="ansi")
    env.reset(seed=0)
    assert str(env.render()).startswith("step 0/4: key ")
    env.step(1)
    env.step(2)
    text = str(env.render())
    assert "value -, asked; last action 2" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepeatFirst(1), "length must be at least 2, got 1"),
        (lambda: RepeatFirst(num_symbols=1), "num_symbols must be at least 2, got 1"),
        (lambda: RepeatPrevious(lag=0), "lag must be at least 1, got 0"),
        (lambda: RepeatPrevious(lag=4, length=4), "length must be at least 5, got 4"),
        (lambda: RepeatPrevious(num_symbols=0), "num_symbols must be at least 2, got 0"),
        (lambda: Parity(1), "length must be at least 2, got 1"),
        (lambda: KeyValueRecall(0), "num_pairs must be at least 1, got 0"),
        (lambda: KeyValueRecall(num_values=1), "num_values must be at least 2, got 1"),
        (lambda: KeyValueRecall(8, num_keys=7), "num_keys must be at least 8, got 7"),
        (lambda: cue_recall(-1), "delay must be at least 0, got -1"),
        (lambda: cue_recall(num_cues=1), "num_cues must be at least 2, got 1"),
        (lambda: Parity(render_mode="human"), "render_mode must be None or one of .*got 'human'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: Callable[[], SymbolStreamEnv], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_size_that_is_not_whole_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"length must be a whole number, got 8\.0 of type float"):
        Parity(8.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [-1, 2])
def test_an_action_out_of_range_is_refused(action: int) -> None:
    env = Parity()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"action must be in 0\.\.1, got {action}"):
        env.step(action)


def test_stepping_past_the_end_or_before_a_reset_is_refused() -> None:
    env = cue_recall(0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    env.step(0)
    env.step(0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
