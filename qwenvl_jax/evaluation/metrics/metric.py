"""What a metric is: predictions become units, the things that are averaged, and scores are functions of weighted units.

That one form serves the score itself (all weights 1), its breakdown by group (weights 0 elsewhere), its bootstrap
interval (weights drawn) and the list of the worst samples (a unit's own values).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qwenvl_jax.evaluation.task import Prediction


@dataclasses.dataclass(frozen=True)
class Units:
    """n things that are averaged: mostly predictions, sometimes several that are judged together (both questions of a
    picture, all rotations of a question).

    ids: of the predictions in each. columns: float64 [n] by name; the first is what a sample is ranked by, higher is
    better. groups: a label of each unit by the name of the grouping; "" for units outside it.
    """

    ids: Sequence[tuple[str, ...]]
    columns: Mapping[str, np.ndarray]
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Score:
    """A number of a report.

    compute: from units and weights, float64 [n], nan where the weights leave nothing to judge. best: the highest that
    it can be. The official scale: most are percentages, MME's sums go to 2000.
    """

    name: str
    compute: Callable[[Units, np.ndarray], float]
    best: float = 100.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A way to judge predictions. variant: whose rules ("official", "qwenvl", "vlmevalkit", "lmms_eval"). scores: the
    first is the headline. note: what this variant does otherwise than the official one, for the report."""

    name: str
    variant: str
    units: Callable[[Sequence[Prediction]], Units]
    scores: tuple[Score, ...]
    note: str = ""


def mean(column: str, scale: float = 100.0) -> Callable[[Units, np.ndarray], float]:
    """The weighted mean of a column, times scale."""

    def compute(units: Units, weights: np.ndarray) -> float:
        total = weights.sum()
        return float(scale * (weights @ units.columns[column]) / total) if total else float("nan")

    return compute
