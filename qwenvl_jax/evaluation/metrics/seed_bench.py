"""SEED-Bench: accuracy over questions of twelve types, nine about pictures and three about videos (Li et al. 2023).

reference: {"answer": number of the right choice, "choices": [str, ...], "type": 1 to 12 as question_type_id has it}.
Reads Prediction.choice, and the reply where that is None. Usual group: type (its name).
"""

from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics.choices import right_choice
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import labels, number
from qwenvl_jax.evaluation.task import Prediction

VIDEO_TYPES = (10, 11, 12)  # action recognition, action prediction, procedure understanding


def units(predictions: Sequence[Prediction]) -> Units:
    """Each question with whether it is about a video."""
    columns = {
        "right": np.array([right_choice(prediction) for prediction in predictions], np.float64),
        "video": np.array([number(prediction, "type") in VIDEO_TYPES for prediction in predictions], np.float64),
    }
    return Units([(prediction.id,) for prediction in predictions], columns, labels(predictions))


def _accuracy(video: bool) -> Callable[[Units, np.ndarray], float]:
    def compute(units: Units, weights: np.ndarray) -> float:
        weights = weights * (units.columns["video"] == video)
        return mean("right")(units, weights)

    return compute


SCORES = (
    Score("accuracy", mean("right")),
    Score("image accuracy", _accuracy(video=False)),
    Score("video accuracy", _accuracy(video=True)),
)
VARIANTS = {variant: Metric("seed_bench", variant, units, SCORES) for variant in ("official", "qwenvl")}
