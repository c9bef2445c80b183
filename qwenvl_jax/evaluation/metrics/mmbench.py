"""MMBench: a question counts when it is answered rightly however its options are turned (Liu et al. 2023).

reference: {"index": the file's index, rotation * 1,000,000 + question, "answer": number of the right choice (absent
where the split keeps it), "choices": [str, ...] as this rotation has them}. Reads Prediction.choice, and the reply
where that is None (`choices.choice_of`). Usual groups: category, l2_category.

A unit is a question with all its rotations.

official: all rotations that were asked are right.
vanilla: the question as it stands (rotation 0, or the first that was asked) is right.
qwenvl: the text that most rotations took is right; between equals one is drawn, by the question's number and SEED.
That is Qwen-VL's "with consistency constraint"; its own draw has no seed.
"""

import collections
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics.choices import LETTERS, chosen, right_choice
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import labels, number, texts
from qwenvl_jax.evaluation.task import Prediction

ROTATION = 1_000_000
SEED = 0


def rotations(predictions: Sequence[Prediction]) -> dict[int, list[Prediction]]:
    """The predictions of each question by its number, in the order of rotations; of two with an index the last."""
    by_index = {number(prediction, "index"): prediction for prediction in predictions}
    questions: dict[int, list[Prediction]] = {}
    for index, prediction in by_index.items():
        questions.setdefault(index % ROTATION, []).append(prediction)
    return {key: sorted(members, key=lambda one: number(one, "index")) for key, members in questions.items()}


def circular(members: Sequence[Prediction]) -> bool:
    """Whether all rotations of a question are answered rightly."""
    return all(right_choice(prediction) for prediction in members)


def vanilla(members: Sequence[Prediction]) -> bool:
    """Whether the first of the rotations of a question is answered rightly."""
    return right_choice(members[0])


def taken(prediction: Prediction) -> str | None:
    """The text of the choice that a prediction takes; None where it takes none."""
    place, choices = chosen(prediction), texts(prediction, "choices")
    return choices[place] if place is not None and 0 <= place < len(choices) else None


def leaders(members: Sequence[Prediction]) -> list[str]:
    """The texts that most rotations of a question took: one, or several that are equal; none where none was taken."""
    counts = collections.Counter(text for text in map(taken, members) if text is not None)
    most = max(counts.values(), default=0)
    return [text for text, count in counts.items() if count == most]


def majority(members: Sequence[Prediction], seed: int = SEED) -> str | None:
    """The text that most rotations of a question took; between equals one drawn by the question's number and `seed`."""
    equals = leaders(members)
    if len(equals) < 2:
        return equals[0] if equals else None
    return random.Random(f"{seed}/{number(members[0], 'index') % ROTATION}").choice(equals)


def majority_right(members: Sequence[Prediction]) -> bool:
    """Whether most rotations of a question took the right text."""
    last = members[-1]  # any would do: the right text is the same in each rotation
    place, choices = number(last, "answer"), texts(last, "choices")
    return 0 <= place < len(choices) and majority(members) == choices[place]


def submission_rows(predictions: Sequence[Prediction], vote: bool = True) -> list[dict[str, int | str]]:
    """{"index", "prediction": letter} of every prediction in its order, for the file that the test server takes.

    With `vote` all rotations of a question get the choice that most of them took, as Qwen-VL submitted. Where nothing
    was chosen the letter is "Z", which is no option.
    """
    voted = {key: majority(members) for key, members in rotations(predictions).items()} if vote else {}
    rows: list[dict[str, int | str]] = []
    for prediction in predictions:
        index, choices = number(prediction, "index"), texts(prediction, "choices")
        text = voted[index % ROTATION] if vote else taken(prediction)
        letter = LETTERS[choices.index(text)] if text is not None and text in choices else "Z"
        rows.append({"index": index, "prediction": letter})
    return rows


def _metric(variant: str, right: Callable[[Sequence[Prediction]], bool], note: str = "") -> Metric:
    def units(predictions: Sequence[Prediction]) -> Units:
        questions = list(rotations(predictions).values())
        firsts = [members[0] for members in questions]
        columns: Mapping[str, np.ndarray] = {"right": np.array([right(members) for members in questions], np.float64)}
        return Units([tuple(one.id for one in members) for members in questions], columns, labels(firsts))

    return Metric("mmbench", variant, units, (Score("accuracy", mean("right")),), note)


VARIANTS = {
    "official": _metric("official", circular),
    "vlmevalkit": _metric("vlmevalkit", circular),
    "vanilla": _metric("vanilla", vanilla, "each question asked once, as it stands"),
    "qwenvl": _metric("qwenvl", majority_right, "the answer of most rotations counts; ties are drawn"),
}
