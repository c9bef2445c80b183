"""Predictions and a metric become scores: plain data with intervals, by group, and every unit's own values."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.metric import Metric, Units
from qwenvl_jax.evaluation.statistics import LEVEL, RESAMPLES, intervals, select
from qwenvl_jax.evaluation.task import Prediction


@dataclasses.dataclass(frozen=True)
class Number:
    """One score. low and high: its 95% interval. n: the units it is of. failed: the predictions among them that have
    an error in place of a reply. All but n and failed are nan where there was nothing to judge."""

    name: str
    value: float
    low: float
    high: float
    n: int
    failed: int
    best: float = 100.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A prediction without a reply, and why."""

    id: str
    error: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a metric says of predictions.

    numbers: the first is the headline. groups: grouping -> label -> the same numbers of that label's units alone.
    samples: predictions. pictures: how many there are to draw from for the intervals, which may be less than units.
    ids and columns: each unit's predictions and values; the first column is what it is ranked by.
    """

    metric: str
    variant: str
    note: str
    samples: int
    pictures: int
    numbers: tuple[Number, ...]
    groups: Mapping[str, Mapping[str, tuple[Number, ...]]]
    failures: tuple[Failure, ...]
    ids: Sequence[tuple[str, ...]]
    columns: Mapping[str, Sequence[float]]
    resamples: int
    seed: int

    @property
    def headline(self) -> Number:
        return self.numbers[0]


def score(
    predictions: Sequence[Prediction],
    metric: Metric,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """The metric's scores of predictions. groups: the groupings to break them down by; all that there are if None."""
    units = metric.units(predictions)
    failures = tuple(
        Failure(prediction.id, prediction.error) for prediction in predictions if prediction.error is not None
    )
    failed = {failure.id for failure in failures}
    clusters = clusters_of(units, predictions)

    def numbers(chosen: np.ndarray) -> tuple[Number, ...]:
        part = select(units, chosen)
        _, part_clusters = np.unique(clusters[chosen], return_inverse=True)
        missing = sum(id in failed for ids in part.ids for id in ids) if failed else 0
        found = intervals(part, metric.scores, part_clusters, resamples, seed)
        return tuple(
            Number(of.name, interval.value, interval.low, interval.high, len(chosen), missing, of.best)
            for of, interval in zip(metric.scores, found, strict=True)
        )

    broken_down = {
        grouping: {label: numbers(places) for label, places in places_by_label(units.groups[grouping]).items()}
        for grouping in (units.groups if groups is None else groups)
        if grouping in units.groups
    }
    return Scores(
        metric.name,
        metric.variant,
        metric.note,
        len(predictions),
        int(clusters.max()) + 1 if len(clusters) else 0,
        numbers(np.arange(len(units.ids))),
        broken_down,
        failures,
        [tuple(ids) for ids in units.ids],
        {name: column.tolist() for name, column in units.columns.items()},
        resamples,
        seed,
    )


def clusters_of(units: Units, predictions: Sequence[Prediction]) -> np.ndarray:
    """A number for each unit, from 0; the same for units about the same pictures. A unit without any is on its own."""
    pictures = {prediction.id: prediction.pictures for prediction in predictions}
    numbers: dict[object, int] = {}
    keys = (tuple(pictures.get(ids[0], ())) or ids for ids in units.ids)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def places_by_label(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Where each label stands, in the order in which they are first met; "" is none."""
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        if label:
            places.setdefault(label, []).append(place)
    return {label: np.array(found) for label, found in places.items()}


def to_json(scores: Scores) -> str:
    """Scores as a JSON text, which has null for nan."""
    return json.dumps(_without_nan(dataclasses.asdict(scores)), ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def from_json(text: str, where: str = "scores") -> Scores:
    """The inverse of `to_json`. Raises UserError that names `where` it stands."""
    try:
        kept = json.loads(text)
        return Scores(
            **kept
            | {
                "numbers": _numbers(kept["numbers"]),
                "groups": {
                    grouping: {label: _numbers(numbers) for label, numbers in labels.items()}
                    for grouping, labels in kept["groups"].items()
                },
                "failures": tuple(Failure(**failure) for failure in kept["failures"]),
                "ids": [tuple(ids) for ids in kept["ids"]],
                "columns": {name: [_number(value) for value in column] for name, column in kept["columns"].items()},
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: no scores as this version writes them ({type(error).__name__}: {error})") from error


def _numbers(kept: Sequence[Mapping[str, Any]]) -> tuple[Number, ...]:
    limits = ("value", "low", "high")
    return tuple(Number(**dict(number) | {name: _number(number[name]) for name in limits}) for number in kept)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def interval_text(number: Number) -> str:
    """The interval as a person reads it: 41.2-44.0, with as many places as it needs."""
    if math.isnan(number.low):
        return ""
    return f"{value_text(number.low, number.best)}–{value_text(number.high, number.best)}"


def value_text(value: float, best: float = 100.0) -> str:
    """A score with two places where it is a share, one where it is a sum in the hundreds; "-" where there is none."""
    if math.isnan(value):
        return "-"
    places = 3 if best <= 2 else 2 if best <= 100 else 1
    return f"{value:,.{places}f}"


CONFIDENCE = f"{LEVEL:.0%}"
