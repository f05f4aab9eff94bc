"""Random draws of whole episodes, for one environment or many at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.int64]
Reals = NDArray[np.float64]


class Chance:
    """Independent draws for N episodes, row i of every result from generator i alone.

    Row i therefore does not depend on the other rows: an environment in a batch meets the episodes that it would meet
    alone. Every draw is made from uniform doubles, so probabilities are exact to 2^-50.
    """

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        """Draw from `generators`, one per episode."""
        self._generators = generators

    def reals(self, size: int) -> Reals:
        """Uniform numbers in [0, 1), [N, size]."""
        return np.array([generator.random(size) for generator in self._generators])

    def symbols(self, num_symbols: int, size: int) -> Symbols:
        """Uniform symbols in 0..num_symbols-1, [N, size]."""
        return (self.reals(size) * num_symbols).astype(np.int64)

    def permutation(self, size: int) -> Symbols:
        """Uniform orders of 0..size-1, [N, size]."""
        return self.reals(size).argsort(axis=1)

    def weighted_order(self, weights: Reals) -> Symbols:
        """Indices drawn one after another without replacement, with chances proportional to `weights`, [N, len]."""
        # The first of independent exponential clocks to ring is i with probability weights[i] / weights.sum().
        return (np.log1p(-self.reals(len(weights))) / -weights).argsort(axis=1)

    def happens(self, probability: float, size: int) -> NDArray[np.bool_]:
        """Independent events of the given probability, [N, size]."""
        return self.reals(size) < probability
