"""Environments that misbehave in the fifth step of an episode, or never end, registered with gymnasium."""

import multiprocessing
import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Faulty(gymnasium.Env[Any, Any]):
    """Does what `fault` says in step `at` of every episode; episodes have nine steps, or no end.

    Args:
        fault: one of FAULTS.
        at: the step; 0: on reset.
        copy: only this one of the copies in one process, in the order in which they were made; None: all.
    """

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    made = 0

    def __init__(self, fault: str = "", at: int = 5, copy: int | None = None) -> None:
        self.fault, self.at = fault if copy in (None, Faulty.made) else "", at
        Faulty.made += 1
        if fault == "slow start" and multiprocessing.parent_process() is not None:
            time.sleep(2.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        answer: tuple[Any, ...] = (np.zeros(3, np.float32), 0.0, False, False, {})
        return (FAULTS[self.fault](answer) if self.due() else answer)[0::4]

    def step(self, action: Any) -> Any:
        self.time += 1
        time.sleep(float(os.environ.get("FAULTY_STEP_SECONDS", "0")))
        if self.fault == "endless":
            return np.zeros(3, np.float32), 1.0, False, False, {}
        answer: tuple[Any, ...] = (np.full(3, self.time / 9, np.float32), 1.0, self.time == 9, False, {})
        return FAULTS[self.fault](answer) if self.due() else answer

    def due(self) -> bool:
        return self.time == self.at and self.fault in FAULTS


def _raise(answer: Any) -> Any:
    raise ZeroDivisionError("the physics broke")


def _exit(answer: Any) -> Any:
    os._exit(3)


FAULTS: dict[str, Any] = {
    "raise": _raise,
    "four parts": lambda answer: answer[:4],
    "nothing": lambda answer: None,
    "one number": lambda answer: (answer[0][:1], *answer[1:]),
    "too many numbers": lambda answer: (np.zeros(4, np.float32), *answer[1:]),
    "no observation": lambda answer: (None, *answer[1:]),
    "objects": lambda answer: (np.array([object()] * 3), *answer[1:]),
    "no reward": lambda answer: (answer[0], None, *answer[2:]),
    "rewards": lambda answer: (answer[0], np.zeros(3), *answer[2:]),
    "no flag": lambda answer: (*answer[:2], None, *answer[3:]),
    "no info": lambda answer: (*answer[:4], None),
    "a list as info": lambda answer: (*answer[:4], []),
    "die": _exit,
}
# What is to be said of each.
SAYS = {
    "raise": r"ZeroDivisionError: the physics broke \(.*faulty_envs.py, line \d+\)",
    "four parts": "a tuple|with 4 entries|not enough values",
    "nothing": "None|NoneType",
    "one number": r"shape \(1,\).* wants the shape \(3,\)",
    "too many numbers": r"shape \(4,\).* wants the shape \(3,\)",
    "no observation": r"observation .* None",
    "objects": r"dtype object",
    "no reward": "reward|NoneType",
    "rewards": "reward|array",
    "no flag": "terminated None",
    "no info": "info None",
    "a list as info": "info of type list",
}
gymnasium.register("Faulty-v0", entry_point="tests.runs.faulty_envs:Faulty")
