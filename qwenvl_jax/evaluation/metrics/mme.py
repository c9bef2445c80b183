"""MME: fourteen tasks of two questions per picture, one to be answered yes and one no (Fu et al. 2023).

reference: {"task": "existence", "image": the picture's name, "answer": "yes" or "no"}. Reads the reply. Usual
group: task.

A unit is a picture with its two questions: those of the same task and image, in pairs as they come. A task's score is
the percentage of questions that are right (acc) plus that of pictures with both right (acc+), 200 at most; perception
is the sum of ten tasks, cognition of four. A picture of which one question was asked has not both right.

official: yes or no in the first four characters, as MME's calculation has it; blanks ahead count.
qwenvl: the same; Qwen-VL's numbers were made with that calculation.
lmms_eval: without blanks ahead and full stops; "y" and "n" alone are understood.
vlmevalkit: whichever of the two words occurs in the reply, not both.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics import yes_no
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units
from qwenvl_jax.evaluation.metrics.reading import field, labels, text
from qwenvl_jax.evaluation.task import Prediction

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION


@dataclasses.dataclass(frozen=True)
class Counts:
    """How the answers of a task compare with the truth. other: neither yes nor no; left out of the first four."""

    true_yes: int
    missed_yes: int
    true_no: int
    false_yes: int
    other: int

    @property
    def precision(self) -> float:
        return _share(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        return _share(self.true_yes, self.true_yes + self.missed_yes)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def counts(answers: Sequence[yes_no.Answer], truths: Sequence[yes_no.Answer]) -> Counts:
    """Compares the answers of a task with the truth."""
    pairs = list(zip(answers, truths, strict=True))
    return Counts(
        pairs.count(("yes", "yes")),
        pairs.count(("no", "yes")),
        pairs.count(("no", "no")),
        pairs.count(("yes", "no")),
        sum(answer == "other" for answer in answers),
    )


def pictures(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """The two predictions of each picture, in the order in which pictures come first."""
    by_picture: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        task = text(field(prediction, "task"))
        if task not in TASKS:
            raise UserError(f"prediction {prediction.id!r}: MME has no task {task!r}; there are {', '.join(TASKS)}")
        by_picture.setdefault((task, text(field(prediction, "image"))), []).append(prediction)
    return [members[start : start + 2] for members in by_picture.values() for start in range(0, len(members), 2)]


def _units(parse: yes_no.Parse) -> Callable[[Sequence[Prediction]], Units]:
    def right(prediction: Prediction) -> bool:
        return prediction.error is None and parse(prediction.reply) == yes_no.truth(prediction)

    def units(predictions: Sequence[Prediction]) -> Units:
        pairs = pictures(predictions)
        hits = np.array([sum(map(right, pair)) for pair in pairs], np.float64)
        columns = {
            "right": hits,
            "asked": np.array([len(pair) for pair in pairs], np.float64),
            "both": (hits == 2).astype(np.float64),
            "task": np.array([TASKS.index(pair[0].reference["task"]) for pair in pairs], np.float64),
        }
        return Units([tuple(one.id for one in pair) for pair in pairs], columns, labels([pair[0] for pair in pairs]))

    return units


def _task_score(task: str) -> Callable[[Units, np.ndarray], float]:
    def compute(units: Units, weights: np.ndarray) -> float:
        weights = weights * (units.columns["task"] == TASKS.index(task))
        if not weights.sum():
            return float("nan")
        accuracy = weights @ units.columns["right"] / (weights @ units.columns["asked"])
        return float(100 * accuracy + 100 * (weights @ units.columns["both"]) / weights.sum())

    return compute


def _sum(tasks: Sequence[str]) -> Callable[[Units, np.ndarray], float]:
    """The sum over those of the tasks of which there is anything."""

    def compute(units: Units, weights: np.ndarray) -> float:
        scores = np.array([_task_score(task)(units, weights) for task in tasks])
        return float("nan") if np.isnan(scores).all() else float(np.nansum(scores))

    return compute


SCORES = (
    Score("total", _sum(TASKS), 2800),
    Score("perception", _sum(PERCEPTION), 2000),
    Score("cognition", _sum(COGNITION), 800),
    *(Score(task, _task_score(task), 200) for task in TASKS),
)
VARIANTS = {
    "official": Metric("mme", "official", _units(yes_no.first_characters), SCORES),
    "qwenvl": Metric("mme", "qwenvl", _units(yes_no.first_characters), SCORES),
    "lmms_eval": Metric(
        "mme", "lmms_eval", _units(yes_no.first_characters_or_letter), SCORES, 'without blanks ahead; "y" and "n" count'
    ),
    "vlmevalkit": Metric(
        "mme", "vlmevalkit", _units(yes_no.only_word), SCORES, "the one of the two words that occurs in the reply"
    ),
}
