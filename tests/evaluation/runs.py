"""Predictions and metrics for the tests of scores and reports: of right and wrong, and of values between."""

from collections.abc import Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.task import Prediction


def units_of(values: Sequence[float], column: str = "right", **groups: Sequence[str]) -> Units:
    """Units of one prediction each."""
    return Units([(str(number),) for number in range(len(values))], {column: np.array(values, float)}, groups)


def _right(predictions: Sequence[Prediction]) -> Units:
    names = dict.fromkeys(name for prediction in predictions for name in prediction.groups)
    return Units(
        [(prediction.id,) for prediction in predictions],
        {
            "right": np.array(
                [p.error is None and p.reply.casefold() in p.reference["answers"] for p in predictions], float
            )
        },
        {name: [prediction.groups.get(name, "") for prediction in predictions] for name in names},
    )


ACCURACY = Metric("accuracy", "official", _right, (Score("accuracy", mean("right")),))


def run(replies: Sequence[str], answer: str = "yes", **fields) -> list[Prediction]:
    """A prediction for each reply; None is one that failed."""
    return [
        Prediction(
            str(number), reply or "", {"answers": [answer]}, error=None if reply is not None else "no picture", **fields
        )
        for number, reply in enumerate(replies)
    ]
