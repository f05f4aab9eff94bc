"""Filtering: add up unreliable copies of a hidden bit."""

import math

import numpy as np

from xlstm_rl.envs.random_draws import Chance
from xlstm_rl.envs.symbol_stream import Stream, SymbolStreamEnv
from xlstm_rl.envs.task import task
from xlstm_rl.envs.task_sizes import real_number, whole_number

# Up to so many copies the binomial sum is quick, and its last digit is part of what benchmark records were made with.
_LARGEST_SUM = 64


@task("NoisyEvidence", "filtering", "num_samples", odd=True)
class NoisyEvidence(SymbolStreamEnv):
    """Every step shows a copy of a hidden bit that is right with some probability; at the end the bit is asked.

    Ability: integrate evidence of equal weight over a whole episode.

    Observation: Box [3], the one-hot copy (zeros at the last step), then a flag that is 1 at the last step. The bit is
    uniform, and copies are right independently with probability `accuracy`.
    Actions: Discrete(2), the bit; ignored before the last step.
    Reward: 1 at the last step if the bit is said, else 0.
    Horizon: num_samples + 1 steps, then terminated. `info["is_success"]`: the answer was right.
    Optimal return: the chance that the majority of the copies is right, a sum of binomial probabilities; the majority
    is what the oracle says. Memoryless return: 0.5, because the question shows nothing.
    """

    hidden_name = "the state behind the evidence"

    def __init__(self, num_samples: int = 21, accuracy: float = 0.65, *, render_mode: str | None = None) -> None:
        """Set the size of the task.

        Args:
            num_samples: Copies, at least 1 and odd, so that there is always a majority.
            accuracy: Probability that a copy is right, 0.5 to 1, not 0.5 itself.
            render_mode: None, "ansi" or "rgb_array".
        """
        self._num_samples = whole_number("num_samples", num_samples, at_least=1)
        if self._num_samples % 2 == 0:
            raise ValueError(f"num_samples must be odd, got {self._num_samples}; take {self._num_samples + 1}")
        self._accuracy = real_number("accuracy", accuracy, at_least=0.5, at_most=1.0)
        if self._accuracy == 0.5:
            raise ValueError("accuracy must be above 0.5, got 0.5: such copies tell nothing")
        super().__init__(
            {"copy": 2},
            length=self._num_samples + 1,
            asked=[self._num_samples],
            num_answers=2,
            render_mode=render_mode,
            optimal_return=majority_accuracies(self._num_samples, self._accuracy)[-1],
        )

    def draw(self, chance: Chance) -> Stream:
        """A new bit and its copies."""
        bit = chance.symbols(2, 1)
        right = chance.happens(self._accuracy, self._num_samples)
        copies = np.where(right, bit, 1 - bit)
        majority = (copies.sum(axis=1, keepdims=True) > self._num_samples / 2).astype(np.int64)
        return Stream((np.hstack([copies, np.full_like(bit, 2)]),), bit, best=majority)


def majority_accuracies(num_samples: int, accuracy: float) -> list[float]:
    """Chance that most of n independent copies are right, a tie counting half, for n from 0 to `num_samples`."""
    found, step = [0.5], accuracy - 0.5
    # One copy more decides a tie of the 2k copies before it, and adds nothing to an odd number of copies. `step` is the
    # chance of that tie, comb(2k, k) (accuracy (1 - accuracy))^k, times what the copy is better than a guess.
    for k in range(num_samples // 2 + 1):
        found += [min(found[-1] + step, 1.0)] * 2
        step *= accuracy * (1.0 - accuracy) * 2 * (2 * k + 1) / (k + 1)
    small = range(min(num_samples, _LARGEST_SUM) + 1)
    return [*(_majority_sum(n, accuracy) for n in small), *found[len(small) : num_samples + 1]]


def _majority_sum(num_samples: int, accuracy: float) -> float:
    """The same for one n, term by term."""
    chances = [
        math.comb(num_samples, right) * accuracy**right * (1.0 - accuracy) ** (num_samples - right)
        for right in range(num_samples + 1)
    ]
    tie = chances[num_samples // 2] / 2 if num_samples % 2 == 0 else 0.0
    return math.fsum(chances[num_samples // 2 + 1 :]) + tie
