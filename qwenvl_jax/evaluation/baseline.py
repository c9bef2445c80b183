"""What one fixed reply to every question would get: a score means little that is no higher than this."""

import collections
import dataclasses
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.evaluation.metrics.metric import Metric
from qwenvl_jax.evaluation.task import Prediction

MOST_PREDICTIONS = 20_000  # above, trying replies takes longer than they tell
TRIED = 4  # frequent reference answers, and as many frequent replies


@dataclasses.dataclass(frozen=True)
class Guess:
    """A reply given to every question, and its headline score."""

    reply: str
    value: float


def best_fixed_reply(predictions: Sequence[Prediction], metric: Metric) -> Guess | None:
    """The best of a few fixed replies: the most frequent reference answers and replies, or each choice,
    or the median box.

    It is chosen on the very samples that it is scored on, so it is an upper bound for a guess of its form. None where
    there is nothing to try, no score above 0, or a metric that reads no replies but a judge's words about them.
    """
    if not 0 < len(predictions) <= MOST_PREDICTIONS:
        return None
    tried = [(reply, _all_with(predictions, reply, choice)) for reply, choice in _candidates(predictions)]
    guesses = [Guess(reply, _headline(metric, fixed)) for reply, fixed in tried]
    guesses = [guess for guess in guesses if not math.isnan(guess.value)]
    if all(guess.value == _headline(metric, predictions) for guess in guesses):
        return None
    best = max(guesses, key=lambda guess: guess.value, default=None)
    return best if best and best.value > 0 else None


def _candidates(predictions: Sequence[Prediction]) -> list[tuple[str, int | None]]:
    """(reply, number of the choice) of each guess."""
    choices = max(len(prediction.reference.get("choices", prediction.likelihoods)) for prediction in predictions)
    if choices:
        return [(letter, number) for number, letter in enumerate(string.ascii_uppercase[:choices])]
    if middle := _median_box(predictions):
        return [(middle, None)]
    answers = collections.Counter(
        text for prediction in predictions for text in set(_answers(prediction.reference))
    ).most_common(TRIED)
    given = collections.Counter(prediction.reply for prediction in predictions).most_common(TRIED)
    return [(text, None) for text in dict.fromkeys(text for text, _ in answers + given) if text.strip()]


def _median_box(predictions: Sequence[Prediction]) -> str:
    """The box between all boxes that are right, in thousandths of a picture; "" where answers are no boxes."""
    references = [prediction.reference for prediction in predictions]
    try:
        sizes = np.array([[reference["width"], reference["height"]] * 2 for reference in references], float)
        boxes = np.array([reference["box"] for reference in references], float) / sizes
    except (KeyError, ValueError, TypeError):
        return ""
    if boxes.shape != (len(references), 4) or not np.isfinite(boxes).all():
        return ""
    x1, y1, x2, y2 = np.clip(np.median(1000 * boxes, axis=0), 0, 999).astype(int)
    return f"({x1},{y1}),({x2},{y2})"


def _answers(reference: Any) -> Iterator[str]:
    """The texts of a reference; of its answers alone where it calls something so."""
    if isinstance(reference, str):
        yield reference
    elif isinstance(reference, Mapping):
        named = [value for key, value in reference.items() if "answer" in key or key == "references"]
        for value in named or reference.values():
            yield from _answers(value)
    elif isinstance(reference, (list, tuple)):
        for value in reference:
            yield from _answers(value)


def _all_with(predictions: Sequence[Prediction], reply: str, choice: int | None) -> list[Prediction]:
    return [dataclasses.replace(prediction, reply=reply, choice=choice, error=None) for prediction in predictions]


def _headline(metric: Metric, predictions: Sequence[Prediction]) -> float:
    units = metric.units(predictions)
    return metric.scores[0].compute(units, np.ones(len(units.ids)))
