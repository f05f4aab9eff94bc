"""Every stream task: its oracle, its exact memoryless ceiling, its interface."""

import math
from collections import defaultdict
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.envs.episodes import ScriptedChance, play
from xlstm_rl.envs import (
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
