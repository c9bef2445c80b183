"""How far a score can be trusted, and whether two runs differ.

Intervals are percentile bootstrap intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13):
units are drawn with replacement, which is the same as multinomial weights, and scores are computed from the weights.
Questions about one picture are no independent evidence, so pictures are drawn with all their units, which widens the
interval as it should (Miller, Adding Error Bars to Evals, 2024, section 2.2). Nothing is stratified: the sizes of
groups vary with the draw, as they would in another sample of the same kind.

Two runs on the same samples are compared by pairs: the interval of the difference from the same draws for both, and a
two-sided p value from what chance alone would do if it made no difference which of the two gave which reply: both
replies to a picture's questions change sides together, or do not. For shares of units that are right or wrong, each
with a picture of its own, this has a closed form, McNemar's exact test (a binomial test of the units that one run has
right and the other wrong; McNemar 1947). Else sides are drawn (Good, Permutation, Parametric and Bootstrap Tests, 2005,
chapter 3).

One draw is held at a time, so memory is a few arrays of n whatever the number of draws.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics.metric import Score, Units

RESAMPLES = 2000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A score with its 95% interval; nan where there was nothing to judge."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second run's score minus the first's, its 95% interval, and how likely chance alone makes one as large.

    test: "McNemar, exact" or "permutation".
    """

    value: float
    low: float
    high: float
    p: float
    test: str


def select(units: Units, chosen: np.ndarray) -> Units:
    """The units at these places."""
    return Units(
        [units.ids[place] for place in chosen],
        {name: column[chosen] for name, column in units.columns.items()},
        {name: [labels[place] for place in chosen] for name, labels in units.groups.items()},
    )


def draws(clusters: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights of units, float64 [n]: how often the cluster of each was drawn. clusters: [n], numbers from 0."""
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1 if len(clusters) else 0
    single = count == len(clusters)  # then the order of clusters makes no difference
    for _ in range(resamples if count else 0):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count).astype(float)
        yield drawn if single else drawn[clusters]


def intervals(
    units: Units, scores: Sequence[Score], clusters: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Each score with its interval."""
    ones = np.ones(len(units.ids))
    values = [score.compute(units, ones) for score in scores]
    judged = [place for place, value in enumerate(values) if not math.isnan(value)]
    drawn = np.full((resamples, len(scores)), math.nan)
    for row, weights in zip(drawn, draws(clusters, resamples, seed), strict=False):
        row[judged] = [scores[place].compute(units, weights) for place in judged]
    count = len(np.unique(clusters))
    return [
        Interval(value, *_limits(drawn[:, place], value, (0.0, score.best), count))
        for place, (score, value) in enumerate(zip(scores, values, strict=True))
    ]


def _limits(drawn: np.ndarray, value: float, span: tuple[float, float], count: int) -> tuple[float, float]:
    """The ends of an interval, from draws of what was `value` on all `count` clusters and can be anything in `span`."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or math.isnan(value):
        return math.nan, math.nan
    if count == 1:  # says nothing about others
        return min(span[0], value), max(span[1], value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if drawn.min() == drawn.max() and value in (0.0, *span):
        # All right, all wrong or no difference: draws of it do not vary, but another sample might. At most this share
        # of clusters is otherwise (Clopper and Pearson 1934), and by no more than the span allows.
        share = 1 - ((1 - LEVEL) / 2) ** (1 / count)
        low, high = value + share * (span[0] - value), value + share * (span[1] - value)
    return float(low), float(high)


def differences(
    first: Units,
    second: Units,
    scores: Sequence[Score],
    clusters: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Difference]:
    """The second's scores minus the first's, whose units are the same ones in the same order."""
    ones = np.ones(len(first.ids))

    def difference(one: Units, other: Units, weights: np.ndarray) -> list[float]:
        return [score.compute(other, weights) - score.compute(one, weights) for score in scores]

    values = difference(first, second, ones)
    drawn = np.array([difference(first, second, weights) for weights in draws(clusters, resamples, seed)])
    drawn = drawn.reshape(-1, len(scores))
    count = len(np.unique(clusters))
    columns = [_share_column((first, second), score) if count == len(clusters) else None for score in scores]
    permuted = np.zeros((0, len(scores)))
    if None in columns and len(clusters):
        pairs = _permuted(first, second, clusters, resamples, seed + 1)
        permuted = np.array([difference(one, other, ones) for one, other in pairs])
    found = []
    for number, (value, column) in enumerate(zip(values, columns, strict=True)):
        best = scores[number].best
        ends = _limits(drawn[:, number], value, (-best, best), count)
        if column is not None:
            p, test = mcnemar(first.columns[column], second.columns[column]), "McNemar, exact"
        else:
            p, test = _permutation_p(permuted[:, number], value), "permutation"
        found.append(Difference(value, *ends, p, test))
    return found


def _permuted(
    first: Units, second: Units, clusters: np.ndarray, resamples: int, seed: int
) -> Iterator[tuple[Units, Units]]:
    """Both runs with the replies to each cluster on sides drawn at random."""
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1
    unequal = [name for name, column in first.columns.items() if not np.array_equal(column, second.columns[name])]
    for _ in range(resamples):
        swapped = rng.integers(0, 2, count, dtype=bool)[clusters]
        sides = [dict(first.columns), dict(first.columns)]
        for name in unequal:
            one, other = first.columns[name], second.columns[name]
            sides[0][name], sides[1][name] = np.where(swapped, other, one), np.where(swapped, one, other)
        yield dataclasses.replace(first, columns=sides[0]), dataclasses.replace(second, columns=sides[1])


def _permutation_p(permuted: np.ndarray, value: float) -> float:
    """The share of draws that differ by as much, this one among them (so that no p value is 0)."""
    permuted = permuted[np.isfinite(permuted)]
    if math.isnan(value) or not len(permuted):
        return math.nan
    slack = 1e-9 * max(1.0, abs(value))  # sums of the same numbers in another order
    return float((1 + (np.abs(permuted) >= abs(value) - slack).sum()) / (1 + len(permuted)))


def _share_column(runs: Sequence[Units], score: Score) -> str | None:
    """The column of zeros and ones whose mean a score is in both runs, if there is one; found by trying weights."""
    count = len(runs[0].ids)
    tried = (np.ones(count), np.arange(1.0, count + 1), np.arange(count + 1.0, 1, -1))

    def is_mean(column: str, run: Units) -> bool:
        values = run.columns[column]
        return bool(np.isin(values, (0, 1)).all()) and all(
            math.isclose(
                score.compute(run, weights),
                score.best * np.average(values, weights=weights),
                rel_tol=1e-9,
                abs_tol=1e-9,
            )
            for weights in tried
        )

    found = (column for column in runs[0].columns if count and all(is_mean(column, run) for run in runs))
    return next(found, None)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided p value of McNemar's exact test for right (1) and wrong (0) of the same units."""
    won, lost = int(((second == 1) & (first == 0)).sum()), int(((second == 0) & (first == 1)).sum())
    of, least = won + lost, min(won, lost)
    logarithms = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of + 1)))])  # of factorials
    upto = np.arange(least + 1)
    terms = logarithms[of] - logarithms[upto] - logarithms[of - upto] - of * math.log(2)
    return min(1.0, 2 * float(np.exp(terms).sum()))


def holm(values: Sequence[float]) -> list[float]:
    """p values of several tests made at once, adjusted so that 0.05 is the chance of one false alarm among them all
    (Holm 1979); nan stays nan and does not count."""
    order = sorted(
        (place for place, value in enumerate(values) if not math.isnan(value)), key=lambda place: values[place]
    )
    adjusted, largest = [math.nan] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
