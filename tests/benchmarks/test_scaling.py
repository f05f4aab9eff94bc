"""The benchmark of several processes."""

from __future__ import annotations

import time

import gymnasium as gym
import pytest

from benchmarks import scaling


@pytest.mark.parametrize("how", ["computes", "waits"])
def test_slow_environments_take_their_time_and_change_nothing_else(how: str) -> None:
    plain, slow = gym.make("CartPole-v1"), scaling.Slow(gym.make("CartPole-v1"), how)
    assert (plain.reset(seed=0)[0] == slow.reset(seed=0)[0]).all()
    begun = time.perf_counter()
    answers = [(plain.step(0), slow.step(0)) for _ in range(5)]
    assert time.perf_counter() - begun >= 5 * scaling.SLOW_SECONDS
    assert all((one[0] == other[0]).all() and one[1:4] == other[1:4] for one, other in answers)


def test_steps_of_training_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "STEPS", 16)
    monkeypatch.setattr(scaling, "ROLLOUTS", 1)
    begun = time.perf_counter()
    rate = scaling.train("cheap", 2)
    # 16 steps of 2 environments, in less than the whole took
    assert rate > 32 / (time.perf_counter() - begun)


@pytest.mark.slow
def test_processes_tell_their_reductions() -> None:
    times = scaling.measured(2, "--child", "reductions", "0")
    assert [*map(int, times)] == [*scaling.SIZES] and min(times.values()) > 0
