"""POPE: does a model see objects that are not there (Li et al. 2023)? Yes or no, half of each.

reference: {"answer": "yes" or "no"}. Reads the reply. Usual group: category ("random", "popular", "adversarial").

Yes is the positive class; precision and recall are 0 where nothing was to be counted.

official: no where the first sentence has the word "no" or "not", else yes: an evasive reply is a yes.
vlmevalkit: whichever of the two words occurs, not both; else wrong, and no for precision and recall.
lmms_eval: the whole reply is the word, else wrong, and neither for precision and recall.

The headline is accuracy; VLMEvalKit leads with F1, and lmms_eval's "yes ratio" is that of the truth.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics import yes_no
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import one_each
from qwenvl_jax.evaluation.task import Prediction

COLUMNS = ("right", "true_yes", "false_yes", "missed_yes", "yes")


def _units(parse: yes_no.Parse, other_is_no: bool = True) -> Callable[[Sequence[Prediction]], Units]:
    def judge(prediction: Prediction) -> dict[str, float]:
        answer, truth = parse(prediction.reply), yes_no.truth(prediction)
        negative = answer == "no" or (other_is_no and answer == "other")
        return {
            "right": answer == truth,
            "true_yes": answer == truth == "yes",
            "false_yes": answer == "yes" != truth,
            "missed_yes": negative and truth == "yes",
            "yes": answer == "yes",
        }

    def units(predictions: Sequence[Prediction]) -> Units:
        found = one_each(predictions, COLUMNS, judge)
        # What failed was not answered yes, so it lowers recall where it should have been.
        failed = [one.error is not None and yes_no.truth(one) == "yes" for one in predictions]
        found.columns["missed_yes"][failed] = 1.0
        return found

    return units


def ratio(part: str, *whole: str) -> Callable[[Units, np.ndarray], float]:
    """A column's percentage of the sum of others; 0 where that is 0."""

    def compute(units: Units, weights: np.ndarray) -> float:
        if not weights.sum():
            return float("nan")
        total = sum(float(weights @ units.columns[column]) for column in whole)
        return 100 * float(weights @ units.columns[part]) / total if total else 0.0

    return compute


precision = ratio("true_yes", "true_yes", "false_yes")
recall = ratio("true_yes", "true_yes", "missed_yes")


def f1(units: Units, weights: np.ndarray) -> float:
    """The harmonic mean of precision and recall; 0 where both are."""
    first, second = precision(units, weights), recall(units, weights)
    return 2 * first * second / (first + second) if first + second else 0.0


SCORES = (
    Score("accuracy", mean("right")),
    Score("F1", f1),
    Score("precision", precision),
    Score("recall", recall),
    Score("yes ratio", mean("yes")),
)
VARIANTS = {
    "official": Metric("pope", "official", _units(yes_no.yes_unless_denied), SCORES),
    "vlmevalkit": Metric(
        "pope", "vlmevalkit", _units(yes_no.only_word), SCORES, "a reply with both words or neither is wrong"
    ),
    "lmms_eval": Metric(
        "pope",
        "lmms_eval",
        _units(yes_no.whole_reply, other_is_no=False),
        SCORES,
        "the whole reply must be the word; another is left out of precision and recall",
    ),
}
