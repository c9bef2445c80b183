"""How metrics read predictions: fields of a reference, and units of one prediction each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.metric import Units
from qwenvl_jax.evaluation.task import Prediction


def field(prediction: Prediction, name: str) -> Any:
    """A field of the reference. Raises UserError that names the prediction and the field where it is missing."""
    try:
        return prediction.reference[name]
    except KeyError:
        there = ", ".join(sorted(prediction.reference)) or "nothing"
        raise UserError(f"prediction {prediction.id!r}: its reference has no {name!r}, but {there}") from None


def text(value: Any) -> str:
    """A JSON value as text: files have numbers, true or null where an answer stands."""
    return "" if value is None else str(value)


def texts(prediction: Prediction, name: str) -> list[str]:
    """A field that is a list of answers, or a single one."""
    value = field(prediction, name)
    return (
        [text(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else [text(value)]
    )


def number(prediction: Prediction, name: str) -> int:
    """A field that is a whole number."""
    value = field(prediction, name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(
            f"prediction {prediction.id!r}: {name!r} of its reference must be a whole number, not {value!r}"
        )
    return value


def labels(predictions: Sequence[Prediction]) -> dict[str, list[str]]:
    """The groupings of predictions: a label of each by the grouping's name, "" where it has none."""
    names = dict.fromkeys(name for prediction in predictions for name in prediction.groups)
    return {name: [text(prediction.groups.get(name)) for prediction in predictions] for name in names}


def one_each(
    predictions: Sequence[Prediction], columns: Sequence[str], judge: Callable[[Prediction], Mapping[str, float]]
) -> Units:
    """Units of one prediction each, `judge` giving the columns; all 0 where there is no reply."""
    judged = [{} if prediction.error is not None else judge(prediction) for prediction in predictions]
    return Units(
        [(prediction.id,) for prediction in predictions],
        {name: np.array([row.get(name, 0.0) for row in judged], np.float64) for name in columns},
        labels(predictions),
    )


def each(judge: Callable[[Prediction], float], column: str = "right") -> Callable[[Sequence[Prediction]], Units]:
    """A metric's `units` where each prediction is judged alone, by one number."""

    def units(predictions: Sequence[Prediction]) -> Units:
        return one_each(predictions, (column,), lambda prediction: {column: float(judge(prediction))})

    return units
