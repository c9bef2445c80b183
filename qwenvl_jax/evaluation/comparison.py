"""Two runs on the same samples: what differs between them, and whether chance could have done it."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units
from qwenvl_jax.evaluation.scores import clusters_of, places_by_label
from qwenvl_jax.evaluation.statistics import RESAMPLES, Difference, differences, holm, select
from qwenvl_jax.evaluation.task import Prediction

SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Compared:
    """One score of both runs. difference: the second minus the first. n: units."""

    name: str
    first: float
    second: float
    difference: Difference
    n: int
    best: float = 100.0

    @property
    def verdict(self) -> int:
        """1 where the second run is better beyond what chance explains, -1 where the first is, else 0."""
        told = self.difference.p < SIGNIFICANT and self.difference.value != 0
        return int(math.copysign(1, self.difference.value)) if told else 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """numbers: the first is the headline's. groups: grouping -> label -> its headline, with p values adjusted for their
    number (Holm). ids, first, second: each unit's predictions and what it is ranked by in both runs. common: samples
    compared. only_first, only_second: samples left out. other_references: samples that the two judge by other answers.
    """

    metric: str
    variant: str
    numbers: tuple[Compared, ...]
    groups: Mapping[str, Mapping[str, Compared]]
    ids: Sequence[tuple[str, ...]]
    first: np.ndarray
    second: np.ndarray
    common: int
    only_first: int
    only_second: int
    other_references: int


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    metric: Metric,
    common: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """The second run against the first. Raises UserError where they are not of the same samples, unless `common` asks
    for those that both have."""
    one, other, only = _aligned(first, second, common)
    units = metric.units(one), metric.units(other)
    if [tuple(ids) for ids in units[0].ids] != [tuple(ids) for ids in units[1].ids]:
        raise UserError(f"the metric {metric.name} groups the samples of the two runs differently; they differ in more"
                        " than replies, so make both with the same task and version")  # fmt: skip
    clusters = clusters_of(units[0], one)

    def compared(chosen: np.ndarray, scores: Sequence[Score]) -> list[Compared]:
        parts = [select(run, chosen) for run in units]
        _, part_clusters = np.unique(clusters[chosen], return_inverse=True)
        found = differences(parts[0], parts[1], scores, part_clusters, resamples, seed)
        ones = np.ones(len(chosen))
        return [
            Compared(
                score.name,
                score.compute(parts[0], ones),
                score.compute(parts[1], ones),
                difference,
                len(chosen),
                score.best,
            )
            for score, difference in zip(scores, found, strict=True)
        ]

    groups = {
        grouping: _adjusted({label: compared(places, metric.scores[:1])[0] for label, places in labels.items()})
        for grouping, labels in ((name, places_by_label(of)) for name, of in units[0].groups.items())
    }
    return Comparison(
        metric.name,
        metric.variant,
        tuple(compared(np.arange(len(units[0].ids)), metric.scores)),
        groups,
        [tuple(ids) for ids in units[0].ids],
        _ranked_by(units[0]),
        _ranked_by(units[1]),
        common=len(one),
        only_first=only[0],
        only_second=only[1],
        other_references=sum(a.reference != b.reference for a, b in zip(one, other, strict=True)),
    )


def _ranked_by(units: Units) -> np.ndarray:
    return next(iter(units.columns.values()), np.zeros(len(units.ids)))


def _adjusted(labels: dict[str, Compared]) -> dict[str, Compared]:
    adjusted = holm([found.difference.p for found in labels.values()])
    return {
        label: dataclasses.replace(found, difference=dataclasses.replace(found.difference, p=p))
        for (label, found), p in zip(labels.items(), adjusted, strict=True)
    }


def _aligned(
    first: Sequence[Prediction], second: Sequence[Prediction], common: bool
) -> tuple[list[Prediction], list[Prediction], tuple[int, int]]:
    """Both in the first's order, and how many samples only one has."""
    known = [_by_id(run, which) for run, which in ((first, "first"), (second, "second"))]
    both = [id for id in known[0] if id in known[1]]
    only = len(known[0]) - len(both), len(known[1]) - len(both)
    if not both:
        raise UserError("the two runs have no sample in common; compare predictions of the same task")
    if any(only) and not common:
        example = next(id for run, other in (known, known[::-1]) for id in run if id not in other)
        raise UserError(
            f"the runs are not of the same samples: {only[0]:,} are in the first only and {only[1]:,} in the second"
            f" only (such as {example!r}); give --common to compare the {len(both):,} that both have"
        )
    return [known[0][id] for id in both], [known[1][id] for id in both], only


def _by_id(predictions: Sequence[Prediction], which: str) -> dict[str, Prediction]:
    found = {prediction.id: prediction for prediction in predictions}
    if len(found) < len(predictions):
        id, count = collections.Counter(prediction.id for prediction in predictions).most_common(1)[0]
        raise UserError(f"the {which} run has {count} predictions of the sample {id!r}; each may be there once")
    return found


def p_text(p: float) -> str:
    """A p value as papers write it."""
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
