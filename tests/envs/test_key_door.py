"""Key-door: what pays, what does not, and its ceilings."""

import itertools
import math

import numpy as np
import pytest

from xlstm_rl.envs import KeyDoor


def play(env: KeyDoor, first: int | None, last: int | None) -> tuple[list[float], bool]:
    """Rewards and success of an episode with the given acts; None for the genuine key."""
    rewards = []
    for step in range(env.facts.horizon):
        choice = first if step == 0 else last
        action = env.oracle_action() if choice is None else choice
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
    assert terminated
    return rewards, info["is_success"]


@pytest.mark.parametrize("delay", [0, 1, 10])
@pytest.mark.parametrize(("first_right", "last_right"), list(itertools.product([False, True], repeat=2)))
def test_the_door_pays_only_for_the_genuine_key_taken_and_named(
    delay: int, first_right: bool, last_right: bool
) -> None:
    env = KeyDoor(delay)
    for seed in range(10):
        key = int(env.reset(seed=seed)[0].argmax())
        wrong = (key + 1) % 4
        rewards, success = play(env, None if first_right else wrong, None if last_right else wrong)
        assert rewards[0] == 0.0 and rewards[-1] == float(first_right and last_right) and success == bool(rewards[-1])


def test_only_the_first_step_shows_the_key_and_only_the_door_is_blank() -> None:
    env = KeyDoor(5, 3)
    seen = np.array([env.reset(seed=0)[0]] + [env.step(0)[0] for _ in range(6)])
    assert seen[0, :3].sum() == 1.0 and not seen[1:, :3].any()
    assert seen[:, 3:6].sum(axis=1).tolist() == [0.0] + [1.0] * 5 + [0.0]
    assert seen[:, 6].tolist() == [1.0] + [0.0] * 5 + [1.0]


def test_the_observations_do_not_tell_which_key_was_taken() -> None:
    env = KeyDoor(4)
    runs = []
    for action in (0, 3):
        runs.append([env.reset(seed=3)[0].tolist()] + [env.step(action)[0].tolist() for _ in range(6)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("delay", [1, 10, 40])
def test_rewards_in_between_have_mean_zero_and_the_stated_deviation_at_any_delay(delay: int) -> None:
    env = KeyDoor(delay, noise=0.7)
    env.reset(seed=0)
    sums = []
    for _ in range(2000):
        env.reset()
        rewards, _ = play(env, 0, 0)
        between = np.array(rewards[1:-1])
        np.testing.assert_allclose(abs(between), 0.7 / math.sqrt(delay))
        sums.append(between.sum())
    assert np.mean(sums) == pytest.approx(0.0, abs=4 * 0.7 / math.sqrt(2000))
    assert np.std(sums) == pytest.approx(0.7, abs=0.05)


def test_no_deterministic_memoryless_policy_beats_the_stated_ceiling() -> None:
    env = KeyDoor(0, 3, noise=0.0)
    seeds = {int(env.reset(seed=seed)[0].argmax()): seed for seed in range(30)}
    best = 0.0
    for *take, name in itertools.product(range(3), repeat=4):
        total = 0.0
        for key, seed in seeds.items():
            env.reset(seed=seed)
            total += sum(play(env, take[key], name)[0])
        best = max(best, total / 3)
    assert best == pytest.approx(env.facts.memoryless_return)
    assert best == pytest.approx(1 / 3)


def test_oracle_and_best_memoryless_policy_collect_the_stated_returns() -> None:
    env = KeyDoor()
    env.reset(seed=0)
    oracle, memoryless = [], []
    for _ in range(1500):
        env.reset()
        oracle.append(sum(play(env, None, None)[0]))
        env.reset()
        memoryless.append(sum(play(env, None, 2)[0]))
    assert np.mean(oracle) == pytest.approx(env.facts.optimal_return, abs=4 * np.std(oracle) / math.sqrt(1500))
    assert np.mean(memoryless) == pytest.approx(
        env.facts.memoryless_return, abs=4 * np.std(memoryless) / math.sqrt(1500)
    )
