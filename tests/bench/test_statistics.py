"""Statistics against figures known from elsewhere, and the laws they obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xlstm_rl.bench.statistics import (
    difference,
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    wilson_interval,
)

Scores = list[NDArray[np.float64]]
finite = st.floats(-10, 10, allow_nan=False, width=32)
tasks = st.lists(st.lists(finite, min_size=3, max_size=3).map(np.array), min_size=1, max_size=3)
pairs = st.integers(1, 3).flatmap(
    lambda count: st.tuples(
        *[st.lists(st.lists(finite, min_size=3, max_size=3).map(np.array), min_size=count, max_size=count)] * 2
    )
)


def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values.mean(axis=-1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 3.0),
        ([1.0, 5.0], 3.0),
        ([9.0, 1.0, 2.0, 3.0], 2.5),
        # scipy.stats.trim_mean(x, 0.25) cuts one of five off at either end
        ([0.0, 1.0, 1.0, 0.5, 100.0], 2.5 / 3),
        (list(range(12)), 5.5),
    ],
)
def test_interquartile_mean_of_known_values(values: list[float], expected: float) -> None:
    assert interquartile_mean(np.array(values, float)) == pytest.approx(expected)


@given(st.lists(finite, min_size=1, max_size=20).map(np.array), st.floats(-5, 5), st.floats(0.125, 5))
def test_interquartile_mean_moves_with_its_values(values: NDArray[np.float64], shift: float, factor: float) -> None:
    value = interquartile_mean(values)
    assert values.min() - 1e-9 <= value <= values.max() + 1e-9
    assert interquartile_mean(values * factor + shift) == pytest.approx(value * factor + shift, abs=1e-6)


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(size=400)
    value, low, high = estimate([values], mean)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.15 * half)


def test_bootstrap_is_stratified_so_differences_of_tasks_are_no_noise() -> None:
    assert estimate([np.zeros(5), np.ones(5)], mean) == (0.5, 0.5, 0.5)


@given(tasks)
def test_interval_is_within_the_scores_and_repeatable(scores: Scores) -> None:
    value, low, high = estimate(scores)
    everything = np.concatenate(scores)
    assert everything.min() - 1e-9 <= low <= high <= everything.max() + 1e-9
    assert estimate(scores) == (value, low, high)


def test_probability_of_improvement_counts_pairs_and_halves_ties() -> None:
    before = [np.array([0.0, 0.5, 1.0, 0.2]), np.array([1.0, 1.0])]
    after = [np.array([1.0, 0.4, 1.0, 0.3]), np.array([2.0, 3.0])]
    # (1 + 0 + 1/2 + 1) / 4 on the first task, 1 on the second
    assert probability_of_improvement(before, after).value == pytest.approx((0.625 + 1) / 2)


@given(pairs)
def test_improvement_one_way_is_the_rest_of_the_other_way(sides: tuple[Scores, Scores]) -> None:
    forth, back = probability_of_improvement(*sides), probability_of_improvement(sides[1], sides[0])
    assert forth.value + back.value == pytest.approx(1)
    assert forth.low + back.high == pytest.approx(1)


@given(pairs)
def test_difference_changes_its_sign_with_the_sides(sides: tuple[Scores, Scores]) -> None:
    forth, back = difference(*sides), difference(sides[1], sides[0])
    assert forth.value == pytest.approx(-back.value)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))


def test_pairing_takes_what_seeds_share_out_of_the_difference() -> None:
    seeds = np.array([0.0, 3.0, 7.0, 1.0, 4.0])
    assert difference([seeds], [seeds + 0.5]) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("measure", [difference, probability_of_improvement])
def test_sides_that_are_no_pairs_are_refused(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match="same tasks and seeds"):
        measure([np.zeros(3)], [np.zeros(4)])


def test_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        estimate([np.array([])])


@given(tasks)
def test_performance_profile_falls_from_one_to_zero(scores: Scores) -> None:
    share, low, high = performance_profile(scores, np.linspace(-11, 11, 23))
    assert share[0] == 1 and share[-1] == 0
    assert (np.diff(share) <= 0).all()
    assert (low <= high).all()


def test_performance_profile_counts_runs_above() -> None:
    share, _, _ = performance_profile([np.array([0.0, 1.0]), np.array([0.5, 1.0])], np.array([0.0, 0.5, 0.9]))
    assert share == pytest.approx([0.75, 0.5, 0.5])


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    # Newcombe 1998, table I; and 5 of 5
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (5, 5, (0.5655, 1.0))],
)
def test_wilson_interval_of_known_counts(successes: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, count) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 50).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    successes, count = counts
    low, high = wilson_interval(successes, count)
    assert 0 <= low <= successes / count + 1e-12 and successes / count - 1e-12 <= high <= 1
    assert wilson_interval(count - successes, count) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"successes={successes}"):
        wilson_interval(successes, count)


def test_single_runs_have_no_interval() -> None:
    scores = [np.array([0.2]), np.array([0.6])]
    for figure in (estimate(scores), difference(scores, scores), probability_of_improvement(scores, scores)):
        assert np.isfinite(figure.value)
        assert np.isnan([figure.low, figure.high]).all()
    assert np.isfinite(estimate([*scores, np.array([0.1, 0.3])])).all()


def test_task_counts_no_more_for_having_more_runs() -> None:
    few, many = np.array([0.2]), np.array([0.6, 0.8, 1.0])
    assert estimate([few, many]).value == pytest.approx(estimate([np.repeat(few, 3), many]).value)
    thresholds = np.array([0.5])
    assert performance_profile([few, many], thresholds)[0] == pytest.approx(0.5)
    assert difference([few, many], [few + 0.1, many + 0.1]).value == pytest.approx(0.1)
