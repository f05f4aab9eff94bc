"""What the speed of tasks is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks import env_speed
from xlstm_rl.envs import HideVelocity


def test_single_environment_is_the_task_and_not_what_it_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    def play_ten(play: Callable[[int], None], steps_per_call: int, seconds: float) -> float:
        shown.clear()
        play(10)
        return 1.0

    def observation(self: HideVelocity, observation: Any) -> Any:
        shown.append(observation)
        return np.zeros(2, np.float32)

    monkeypatch.setattr(env_speed, "steps_per_second", play_ten)
    monkeypatch.setattr(HideVelocity, "observation", observation)
    env_speed.single_speed("xlstm_rl/CartPoleNoVelocity-v0", 0.1)
    assert len(shown) >= 10
