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

from xlstm_rl.envs import (
    Chance,
    Copy,
    Cycle,
    KeyDoor,
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
    "recall_rare_keys": lambda: KeyValueRecall(4, 3, 20, key_exponent=1.5),
    "cue": cue_recall,
    "cue_no_delay": lambda: cue_recall(0, 5),
    "copy": Copy,
    "copy_one": lambda: Copy(1, 2),
    "overwrite": Overwrite,
    "overwrite_nothing": lambda: Overwrite(3, 3, 2),
    "nearest": NearestSoFar,
    "nearest_of_one": lambda: NearestSoFar(1, 2, 1),
    "cycle": Cycle,
    "cycle_shortest": lambda: Cycle(2, 1),
    "shells": ShellGame,
    "shells_five": lambda: ShellGame(5, 20),
}
SMALL_SIZES: dict[str, Callable[[], SymbolStreamEnv]] = {
    "first": lambda: RepeatFirst(4, 3),
    "first_blank": lambda: RepeatFirst(4, 3, distractors=False),
    "previous": lambda: RepeatPrevious(2, 5, 2),
    "previous_lag_1": lambda: RepeatPrevious(1, 4, 3),
    "parity": lambda: Parity(6),
    "recall": lambda: KeyValueRecall(3, 2),
    "recall_many_keys": lambda: KeyValueRecall(2, 3, 4),
    "recall_rare_keys": lambda: KeyValueRecall(2, 3, 4, key_exponent=1.5),
    "cue": lambda: cue_recall(3, 4),
    "copy": lambda: Copy(4, 3),
    "overwrite": lambda: Overwrite(2, 4, 2),
    "nearest": lambda: NearestSoFar(5, 3),
    "cycle": lambda: Cycle(4, 4),
    "shells": lambda: ShellGame(3, 3),
    "evidence": lambda: NoisyEvidence(5, 0.7),
}
each_size = pytest.mark.parametrize("size", SIZES)
each_small_size = pytest.mark.parametrize("size", SMALL_SIZES)


class ScriptedChance(Chance):
    """Visits every outcome of its draws, one per episode, and knows how likely each is; real numbers stay the same."""

    def __init__(self) -> None:
        super().__init__([])
        self.chances: list[list[float]] = []
        self.choices: list[int] = []
        self._position = 0

    def outcomes(self) -> Iterator[None]:
        while True:
            self._position = 0
            yield
            while self.choices and self.choices[-1] + 1 == len(self.chances[-1]):
                self.choices.pop()
                self.chances.pop()
            if not self.choices:
                return
            self.choices[-1] += 1

    def probability(self) -> float:
        return math.prod(chances[choice] for chances, choice in zip(self.chances, self.choices, strict=True))

    def reals(self, size: int) -> NDArray[np.float64]:
        return np.random.default_rng(0).random((1, size))

    def symbols(self, num_symbols: int, size: int) -> NDArray[np.int64]:
        code = self._choose([num_symbols**-size] * num_symbols**size)
        return np.array([[code // num_symbols**place % num_symbols for place in range(size)]])

    def permutation(self, size: int) -> NDArray[np.int64]:
        return self.weighted_order(np.ones(size))

    def weighted_order(self, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        orders = list(itertools.permutations(range(len(weights))))
        chances = []
        for order in orders:
            left = [float(weights[list(order[place:])].sum()) for place in range(len(order))]
            chances.append(math.prod(float(weights[key]) / rest for key, rest in zip(order, left, strict=True)))
        return np.array([orders[self._choose(chances)]])

    def happens(self, probability: float, size: int) -> NDArray[np.bool_]:
        events = [self._choose([probability, 1.0 - probability]) == 0 for _ in range(size)]
        return np.array([events])

    def _choose(self, chances: list[float]) -> int:
        if self._position == len(self.choices):
            self.choices.append(0)
            self.chances.append(chances)
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
    chance = ScriptedChance()
    weights: dict[bytes, NDArray[np.float64]] = defaultdict(lambda: np.zeros(env.action_space.n))  # type: ignore[attr-defined]
    total = 0.0
    for _ in chance.outcomes():
        frames, answers, *_ = env.episodes(chance)
        total += chance.probability()
        for frame, answer in zip(frames[0], answers[0], strict=False):
            if answer >= 0:
                weights[frame.tobytes()][answer] += chance.probability() / env.num_asked
    assert total == pytest.approx(1.0, abs=1e-12)
    return float(sum(weight.max() for weight in weights.values()))


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


def test_oracle_of_noisy_evidence_is_right_as_often_as_stated() -> None:
    env = NoisyEvidence()
    env.reset(seed=0)
    returns = [play(env, lambda _: env.oracle_action()) for _ in range(3000)]
    assert np.mean(returns) == pytest.approx(env.facts.optimal_return, abs=4 * 0.5 / math.sqrt(3000))


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
        (lambda: KeyValueRecall(key_exponent=-1.0), "key_exponent must be finite and in 0.0..inf, got -1.0"),
        (lambda: Copy(0), "num_items must be at least 1, got 0"),
        (lambda: Overwrite(6, 5), "num_writes must be at least 6, got 5"),
        (lambda: NearestSoFar(dim=0), "dim must be at least 1, got 0"),
        (lambda: Cycle(1), "modulus must be at least 2, got 1"),
        (lambda: ShellGame(6), "num_shells must be at most 5, got 6"),
        (lambda: NoisyEvidence(20), "num_samples must be odd, got 20; take 21"),
        (lambda: NoisyEvidence(accuracy=0.5), "accuracy must be above 0.5, got 0.5"),
        (lambda: NoisyEvidence(accuracy=1.5), "accuracy must be finite and in 0.5..1.0, got 1.5"),
        (lambda: KeyDoor(-1), "delay must be at least 0, got -1"),
        (lambda: KeyDoor(noise=float("nan")), "noise must be finite and in 0.0..inf, got nan"),
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
