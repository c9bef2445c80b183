"""Intervals and significance against closed forms and cases that can be counted by hand."""

import itertools
import math

import numpy as np
import pytest
from evaluation.runs import units_of

from qwenvl_jax.evaluation import statistics
from qwenvl_jax.evaluation.metrics.metric import Score, Units, mean
from qwenvl_jax.evaluation.statistics import differences, draws, holm, intervals, mcnemar

SHARE = (Score("accuracy", mean("right")),)


def alone(units: Units) -> np.ndarray:
    return np.arange(len(units.ids))


def interval(units: Units, clusters=None, **options):
    return intervals(units, SHARE, alone(units) if clusters is None else clusters, **options)[0]


@pytest.mark.parametrize(("right", "of"), [(700, 1000), (120, 400), (50, 100)])
def test_a_share_has_its_normal_interval(right, of):
    """Draws of a share have the standard error sqrt(p (1 - p) / n). An end of the interval, a quantile at 2.5% of R
    draws, is off by sqrt(0.025 * 0.975 / R) / density of a normal at 1.96, which is 2.67 / sqrt(R) standard errors; a
    share is a multiple of 1/n besides."""
    found = interval(units_of([1] * right + [0] * (of - right)), resamples=4000)
    error = 100 * math.sqrt(right / of * (1 - right / of) / of)
    slack = 4 * 2.67 / math.sqrt(4000) * error + 100 / of
    assert found.value == pytest.approx(100 * right / of)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=slack)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=slack)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 300 samples of 200 units at 30%, intervals hold 30% in 95%; the share found is within 4 of its own standard
    errors (1.3%), and the percentile interval falls short by a little at this size."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        found = interval(units_of(rng.random(200) < 0.3), resamples=300, seed=seed)
        held += found.low <= 30 <= found.high
    assert 0.90 < held / 300 < 0.99


def test_the_draws_are_those_of_all_samples_there_can_be():
    """Two units: both once in half of the draws, one of them twice in a quarter each."""
    found = np.array(list(draws(np.arange(2), 4000, 0)))
    assert (found.sum(axis=1) == 2).all()
    assert (found[:, 0] == 1).mean() == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_questions_about_one_picture_are_drawn_together():
    """Ten copies of each of 50 units say no more than the 50: the interval is as wide, and not sqrt(10) narrower."""
    values = (np.arange(50) < 30).astype(float)
    single = interval(units_of(values), resamples=3000)
    copies, clusters = units_of(np.repeat(values, 10)), np.repeat(np.arange(50), 10)
    together = interval(copies, clusters, resamples=3000)
    assert together.high - together.low == pytest.approx(single.high - single.low, rel=0.15)
    assert interval(copies).high - interval(copies).low < 0.5 * (single.high - single.low)


def test_the_same_seed_gives_the_same_interval():
    units = units_of(np.random.default_rng(1).random(50))
    assert interval(units, seed=3) == interval(units, seed=3) != interval(units, seed=4)


@pytest.mark.parametrize("of", [2, 20, 1000])
def test_all_right_is_not_certain(of):
    """Clopper and Pearson's end for n of n is 0.025 ** (1 / n), that for none the same from below."""
    end = 100 * 0.025 ** (1 / of)
    assert interval(units_of([1] * of)) == statistics.Interval(100.0, pytest.approx(end), 100.0)
    assert interval(units_of([0] * of)) == statistics.Interval(0.0, 0.0, pytest.approx(100 - end))


def test_one_picture_says_nothing_about_others():
    assert interval(units_of([1, 0]), np.zeros(2, int)) == statistics.Interval(50.0, 0.0, 100.0)
    found = difference([1, 0], [1, 1], np.zeros(2, int), resamples=50)
    assert (found.value, found.low, found.high, found.p) == (50.0, -100.0, 100.0, 1.0)


def test_nothing_to_judge_has_no_interval():
    found = interval(units_of([]))
    assert all(math.isnan(value) for value in (found.value, found.low, found.high))


def test_a_score_that_some_draws_cannot_have():
    """A group that a draw may miss: the interval is of the draws that have it."""
    units = Units([("a",), ("b",)], {"right": np.array([1.0, 0.0]), "in": np.array([1.0, 0.0])})

    def compute(units, weights):
        return mean("right")(units, weights * units.columns["in"])

    found = intervals(units, (Score("in", compute),), alone(units))[0]
    assert found.value == 100.0
    assert found.high == 100.0
    assert found.low < 50


def difference(first, second, clusters=None, score=SHARE, **options):
    one, other = units_of(first), units_of(second)
    return differences(one, other, score, alone(one) if clusters is None else clusters, **options)[0]


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (6, 0, 2 / 64),
        (8, 1, 2 * 10 / 512),
        (10, 3, 2 * (1 + 13 + 78 + 286) / 8192),
    ],
)
def test_mcnemar_counts_what_a_coin_could_do(won, lost, p):
    first = np.array([0.0] * won + [1.0] * lost + [1.0, 0.0])
    second = np.array([1.0] * won + [0.0] * lost + [1.0, 0.0])
    assert mcnemar(first, second) == pytest.approx(min(p, 1.0))
    assert mcnemar(second, first) == pytest.approx(min(p, 1.0))
    found = difference(first, second, resamples=10)
    assert (found.test, found.p) == ("McNemar, exact", pytest.approx(min(p, 1.0)))


def test_mcnemar_of_many():
    """A normal with continuity is close for 40,000 units of which the runs tell apart half."""
    rng = np.random.default_rng(0)
    first, second = (rng.random((2, 40_000)) < 0.5).astype(float)
    second[:150] = 1.0
    won, lost = ((second > first).sum(), (first > second).sum())
    z = (abs(won - lost) - 1) / math.sqrt(won + lost)
    assert mcnemar(first, second) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_the_permutation_test_is_the_share_of_all_swaps():
    """Eight pairs have 256 ways to swap sides, which can all be tried."""
    first, second = (
        np.array([0.2, 0.5, 0.1, 0.9, 0.4, 0.3, 0.6, 0.2]),
        np.array([0.6, 0.9, 0.4, 0.8, 0.7, 0.5, 0.8, 0.3]),
    )
    gains = second - first
    every = [abs(np.dot(signs, gains)) >= abs(gains.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=8)]
    found = difference(first, second, resamples=20_000)
    assert found.test == "permutation"
    assert found.value == pytest.approx(100 * gains.mean())
    assert found.p == pytest.approx(np.mean(every), abs=4 * math.sqrt(0.02 / 20_000))


def test_replies_to_one_picture_change_sides_together():
    """Of two pictures, all alike: one of two swaps of sides gives as large a difference, and so does its mirror."""
    first, second = [0] * 10 + [0] * 10, [1] * 10 + [1] * 10
    clusters = np.repeat(np.arange(2), 10)
    found = difference(first, second, clusters, resamples=4000)
    assert found.test == "permutation"
    assert found.p == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))
    assert difference(first, second).p < 1e-4  # twenty pictures are another matter


def test_pairs_are_compared_and_not_two_crowds():
    """The same hard and easy questions for both: a gain of 1 in each is certain, though values range over 90."""
    first = np.arange(0, 0.9, 0.01)
    found = difference(first, first + 0.01)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.p < 0.001


def test_equal_runs_may_differ_elsewhere():
    """Of n samples without a difference, at most 1 - 0.025 ** (1 / n) of all may have one."""
    found = difference([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])
    end = 100 * (1 - 0.025 ** (1 / 3))
    assert (found.value, found.low, found.high, found.p) == (0, pytest.approx(-end), pytest.approx(end), 1)


@pytest.mark.parametrize("won", range(1, 12))
def test_interval_and_test_agree_where_all_are_won(won):
    found = difference([0] * won, [1] * won, resamples=20)
    assert (found.low > 0) == (found.p < 0.05)
    assert found.high == 100


def test_a_score_that_is_no_share_is_permuted():
    """The square of a share is no mean, though its column has zeros and ones alone."""
    score = (Score("squared", lambda units, weights: 100 * (mean("right", 1.0)(units, weights)) ** 2),)
    assert difference([0, 0, 1, 0], [1, 1, 1, 1], score=score).test == "permutation"


def test_false_alarms_are_as_rare_as_they_say():
    """Of 200 pairs of runs that differ by chance alone, 5% are called different, give or take 4 standard errors."""
    rng = np.random.default_rng(0)
    alarms = sum(difference(*rng.random((2, 40)), resamples=200, seed=seed).p < 0.05 for seed in range(200))
    assert alarms <= 200 * (0.05 + 4 * math.sqrt(0.05 * 0.95 / 200))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, math.nan, 0.9])[0] == 1.0
    assert math.isnan(holm([0.5, math.nan])[1])
    assert holm([]) == []
