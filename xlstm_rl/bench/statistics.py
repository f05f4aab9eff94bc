"""Statistics of few runs on several tasks (Agarwal et al. 2021), each with its interval.

Scores come as a list of arrays, one per task, each over seeds. Tasks may have different numbers of seeds and
count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scores = Sequence[Array]
RESAMPLES = 2000
# Both tails of a 95 % interval, and its normal quantile.
TAILS = (2.5, 97.5)
QUANTILE_95 = 1.959963984540054


class Estimate(NamedTuple):
    """A figure with its 95 % interval, whose ends are NaN where no task has more than one run to draw from."""

    value: float
    low: float
    high: float


def interquartile_mean(values: Array) -> Array:
    """Mean of the middle half of the last axis: a quarter of the values, rounded down, is cut off at either end."""
    count = values.shape[-1]
    cut = count // 4
    mean: Array = np.sort(values, axis=-1)[..., cut : count - cut].mean(axis=-1)
    return mean


def estimate(scores: Scores, statistic: Callable[[Array], Array] = interquartile_mean, *, seed: int = 0) -> Estimate:
    """A statistic of all scores, with a percentile interval from a bootstrap stratified by task.

    Args:
        scores: [seeds] for each task.
        statistic: reduces the last axis.
        seed: of the resampling.

    Raises:
        ValueError: there are no scores.
    """
    drawn = [task[rows] for task, rows in zip(scores, _resample(scores, seed), strict=True)]
    return _interval(float(statistic(_pooled(scores))), statistic(_pooled(drawn)), scores)


def difference(before: Scores, after: Scores, *, seed: int = 0) -> Estimate:
    """Interquartile mean of `after` minus that of `before`; runs of equal place share a seed and are drawn together.

    Raises:
        ValueError: the two differ in shape, or there are no scores.
    """
    _check_pairs(before, after)
    rows = _resample(before, seed)
    drawn = [
        interquartile_mean(_pooled([task[chosen] for task, chosen in zip(side, rows, strict=True)]))
        for side in (before, after)
    ]
    value = interquartile_mean(_pooled(after)) - interquartile_mean(_pooled(before))
    return _interval(float(value), drawn[1] - drawn[0], before)


def probability_of_improvement(before: Scores, after: Scores, *, seed: int = 0) -> Estimate:
    """How often a run of `after` scores above the run of `before` with the same seed, averaged over tasks.

    Equal scores count half.

    Raises:
        ValueError: the two differ in shape, or there are no scores.
    """
    _check_pairs(before, after)
    wins = [(new > old) + 0.5 * (new == old) for old, new in zip(before, after, strict=True)]
    rows = _resample(wins, seed)
    drawn = np.mean([task[chosen].mean(axis=1) for task, chosen in zip(wins, rows, strict=True)], axis=0)
    return _interval(float(np.mean([task.mean() for task in wins])), drawn, wins)


def performance_profile(scores: Scores, thresholds: Array, *, seed: int = 0) -> tuple[Array, Array, Array]:
    """Share of runs that score above each threshold.

    Args:
        scores: [seeds] for each task.
        thresholds: [N].
        seed: of the resampling.

    Returns:
        The share and both ends of its 95 % interval, [N] each.
    """

    def shares(values: Array) -> Array:
        return np.stack([(values > threshold).mean(axis=-1) for threshold in thresholds], axis=-1)

    drawn = [task[rows] for task, rows in zip(scores, _resample(scores, seed), strict=True)]
    low, high = np.percentile(shares(_pooled(drawn)), TAILS, axis=0)
    return shares(_pooled(scores)), low, high


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a probability of which `successes` of `count` were seen (Wilson 1927).

    Raises:
        ValueError: `successes` is not from 0 to `count`, or `count` is 0.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"successes={successes} must be from 0 to count={count}, and count at least 1")
    share, z2 = successes / count, QUANTILE_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = QUANTILE_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _pooled(scores: Scores) -> Array:
    """All scores along the last axis, those of tasks with fewer runs repeated until all tasks have as many."""
    counts = [task.shape[-1] for task in scores]
    repeated = [[task] * (math.lcm(*counts) // count) for task, count in zip(scores, counts, strict=True)]
    return np.concatenate([copy for copies in repeated for copy in copies], axis=-1)


def _resample(scores: Scores, seed: int) -> list[NDArray[np.int64]]:
    """Rows of each task drawn with replacement, [RESAMPLES, seeds]."""
    if not scores or any(len(task) == 0 for task in scores):
        raise ValueError("there are no scores of some task; leave it out")
    generator = np.random.default_rng(seed)
    return [generator.integers(len(task), size=(RESAMPLES, len(task))) for task in scores]


def _interval(value: float, resampled: Array, scores: Scores) -> Estimate:
    if all(len(task) == 1 for task in scores):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(resampled, TAILS)
    return Estimate(value, float(low), float(high))


def _check_pairs(before: Scores, after: Scores) -> None:
    if [len(task) for task in before] != [len(task) for task in after]:
        raise ValueError("runs are paired by seed: both sides need the same tasks and seeds")
