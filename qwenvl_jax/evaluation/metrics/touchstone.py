"""TouchStone: a judge scores a reply beside a reference answer, twice, each in either place (Bai et al. 2023).

reference: {"judgements": [the judge's reply with the reference answer first, its reply with the model's answer
first]}, a missing one null, and whatever the judge was asked with. Usual groups: category, task_name.

The judge begins with a line of two scores from 1 to 10 (`scores_of`). The number is the mean of all scores of the model
times 100; judgements without two scores are left out, as in the official evaluation, and counted ("judged").
"""

from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units
from qwenvl_jax.evaluation.metrics.reading import field, one_each
from qwenvl_jax.evaluation.task import Prediction

ROUNDS = 2


def scores_of(judgement: str | None) -> tuple[float, float] | None:
    """The two scores in the first line of a judge's reply, a blank between them; None where there is anything else."""
    try:
        first, second = (float(word) for word in (judgement or "").strip().split("\n")[0].strip().split(" "))
    except ValueError:
        return None
    return first, second


def _judge(prediction: Prediction) -> dict[str, float]:
    judgements = field(prediction, "judgements")
    if not isinstance(judgements, Sequence) or isinstance(judgements, str) or len(judgements) != ROUNDS:
        raise UserError(f"prediction {prediction.id!r}: 'judgements' of its reference must be a list of two replies")
    # The model's answer is the second of the first round and the first of the second.
    rounds = [
        (found, found[place])
        for place, found in ((1, scores_of(judgements[0])), (0, scores_of(judgements[1])))
        if found
    ]
    model = sum(score for _, score in rounds)
    both = sum(sum(found) for found, _ in rounds)
    return {
        "score": model / len(rounds) if rounds else 0.0,
        "sum": model,
        "reference": both - model,
        "judged": len(rounds),
        "rounds": ROUNDS,
    }


def units(predictions: Sequence[Prediction]) -> Units:
    """Each question with what its rounds gave; one without a reply got 0 in both."""
    found = one_each(predictions, ("score", "sum", "reference", "judged", "rounds"), _judge)
    failed = [prediction.error is not None for prediction in predictions]
    for column in ("judged", "rounds"):
        found.columns[column][failed] = ROUNDS
    return found


def _per(part: str, whole: str) -> Callable[[Units, np.ndarray], float]:
    def compute(units: Units, weights: np.ndarray) -> float:
        total = weights @ units.columns[whole]
        return float(100 * (weights @ units.columns[part]) / total) if total else float("nan")

    return compute


VARIANTS = {
    "official": Metric(
        "touchstone",
        "official",
        units,
        (
            Score("score", _per("sum", "judged"), 1000),
            Score("reference answer", _per("reference", "judged"), 1000),
            Score("judged", _per("judged", "rounds")),
        ),
    )
}
