"""HallusionBench: questions in sets about a figure and altered figures, to be answered yes or no (Guan et al. 2024).

reference: {"answer": "yes" or "no", "category": "VD" or "VS", "subcategory": str, "set_id": str, "figure_id": str,
"question_id": str}. Reads the reply. Usual groups: category, subcategory.

aAcc: questions that are right. fAcc: figures all of whose questions are right. qAcc: questions that are right with
every figure of their set. A unit is a set, which has all of these inside.

official: in the category VS figure 0 means that there was none, which is no figure in fAcc. The official judge is
GPT-4; here the reply must have one of the words yes and no, not both, as VLMEvalKit reads it.
vlmevalkit: figure 0 is a figure.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics import yes_no
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units
from qwenvl_jax.evaluation.metrics.reading import field, labels, text
from qwenvl_jax.evaluation.task import Prediction

SET = ("category", "subcategory", "set_id")


def right(prediction: Prediction) -> bool:
    """Whether a reply says the right word."""
    return prediction.error is None and yes_no.only_word(prediction.reply) == yes_no.truth(prediction)


def all_right(members: Sequence[Prediction], by: str) -> list[bool]:
    """Whether those of a set that share the field `by` are all right, for each of its values."""
    parts: dict[str, list[bool]] = {}
    for prediction in members:
        parts.setdefault(text(field(prediction, by)), []).append(right(prediction))
    return [all(part) for part in parts.values()]


def _units(figure_0_counts: bool) -> Callable[[Sequence[Prediction]], Units]:
    def is_figure(prediction: Prediction) -> bool:
        return (
            figure_0_counts or prediction.reference["category"] != "VS" or text(field(prediction, "figure_id")) != "0"
        )

    def row(members: Sequence[Prediction]) -> tuple[float, ...]:
        figures = all_right(list(filter(is_figure, members)), "figure_id")
        questions = all_right(members, "question_id")
        hits = sum(map(right, members))
        parts = (hits, len(members), sum(figures), len(figures), sum(questions), len(questions))
        return hits / len(members), *map(float, parts)

    def units(predictions: Sequence[Prediction]) -> Units:
        sets: dict[tuple[str, ...], list[Prediction]] = {}
        for prediction in predictions:
            sets.setdefault(tuple(text(field(prediction, name)) for name in SET), []).append(prediction)
        names = ("share", "right", "asked", "figures_right", "figures", "questions_right", "questions")
        table = np.array([row(members) for members in sets.values()], np.float64).reshape(-1, len(names))
        ids = [tuple(one.id for one in members) for members in sets.values()]
        return Units(ids, dict(zip(names, table.T, strict=True)), labels([members[0] for members in sets.values()]))

    return units


def _share(part: str, whole: str) -> Callable[[Units, np.ndarray], float]:
    def compute(units: Units, weights: np.ndarray) -> float:
        total = weights @ units.columns[whole]
        return float(100 * (weights @ units.columns[part]) / total) if total else float("nan")

    return compute


SCORES = (
    Score("aAcc", _share("right", "asked")),
    Score("fAcc", _share("figures_right", "figures")),
    Score("qAcc", _share("questions_right", "questions")),
)


def average(units: Units, weights: np.ndarray) -> float:
    """The mean of the three, the one number that model reports give."""
    return float(np.mean([score.compute(units, weights) for score in SCORES]))


VARIANTS = {
    "official": Metric(
        "hallusionbench",
        "official",
        _units(figure_0_counts=False),
        (*SCORES, Score("average", average)),
        "the words yes and no are looked for, where the official judge is GPT-4",
    ),
    "vlmevalkit": Metric(
        "hallusionbench",
        "vlmevalkit",
        _units(figure_0_counts=True),
        (*SCORES, Score("average", average)),
        "questions without a figure count as one figure of their set",
    ),
}
