"""What the tests of the tasks share: episodes by enumeration and by play."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from xlstm_rl.envs import Chance


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
