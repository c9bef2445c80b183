"""Relaxed accuracy: a number may be off by 5% (Methani et al. 2020; ChartQA, Masry et al. 2022).

reference: {"answers": [str or number, ...]}, the best of which counts. Reads the reply. Usual group: split ("human" or
"augmented"; ChartQA's number is the mean of the two, which have the same size).

The function that everybody shares is pix2struct's. A trailing "%" makes hundredths of a number. A target of 0 must be
met as a string, for nothing is within 5% of it.

official: 5% of the target.
qwenvl: Qwen-VL's evaluation passes prediction and target in each other's place, so 5% of the prediction.
vlmevalkit: as official.
lmms_eval: as official, but blanks around the prediction count.
"""

from collections.abc import Callable, Sequence

from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, texts
from qwenvl_jax.evaluation.task import Prediction

TOLERANCE = 0.05


def as_number(answer: str) -> float | None:
    """The number that a text is, hundredths where it ends with "%"; None where it is none."""
    try:
        return float(answer.rstrip("%")) / 100 if answer.endswith("%") else float(answer)
    except ValueError:
        return None


def relaxed_match(target: str, prediction: str, tolerance: float = TOLERANCE) -> bool:
    """Whether a prediction is within a share of the target, both being numbers, else whether they are the same word."""
    given, wanted = as_number(prediction), as_number(target)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == target.lower()


def relaxed_accuracy(answers: Sequence[str], prediction: str) -> bool:
    """Whether a prediction is right by one of the answers."""
    return any(relaxed_match(answer, prediction.strip()) for answer in answers)


def qwenvl_relaxed_accuracy(answers: Sequence[str], prediction: str) -> bool:
    """The same as Qwen-VL's evaluation has it, with the answer and the prediction in each other's place."""
    return any(relaxed_match(prediction.strip(), answer) for answer in answers)


def unstripped_relaxed_accuracy(answers: Sequence[str], prediction: str) -> bool:
    """The same where blanks around the prediction count."""
    return any(relaxed_match(answer, prediction) for answer in answers)


def _metric(variant: str, right: Callable[[Sequence[str], str], bool], note: str = "") -> Metric:
    def judge(prediction: Prediction) -> float:
        return right(texts(prediction, "answers"), prediction.reply)

    return Metric("relaxed_accuracy", variant, each(judge), (Score("relaxed accuracy", mean("right")),), note)


VARIANTS = {
    "official": _metric("official", relaxed_accuracy),
    "qwenvl": _metric("qwenvl", qwenvl_relaxed_accuracy, "within 5% of the prediction, not of the target"),
    "vlmevalkit": _metric("vlmevalkit", relaxed_accuracy),
    "lmms_eval": _metric("lmms_eval", unstripped_relaxed_accuracy, "blanks around the prediction count"),
}
