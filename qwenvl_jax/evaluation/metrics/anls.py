"""ANLS: average normalised Levenshtein similarity (Biten et al. 2019; DocVQA, InfographicVQA, ST-VQA).

reference: {"answers": [str, ...]}. Reads the reply. Usual groups: answer_type, evidence, operation (InfographicVQA).

As in the script of the Robust Reading competition: the distance is that of the texts in lower case with single blanks,
but it is divided by the length of the longer text as it stands; a similarity below the threshold is 0. qwenvl and
vlmevalkit use that script.
"""

from collections.abc import Sequence

from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, texts
from qwenvl_jax.evaluation.task import Prediction

THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a character that turn one into the other."""
    if len(first) > len(second):
        first, second = second, first
    row = list(range(len(first) + 1))
    for down, wanted in enumerate(second, 1):
        diagonal, row[0] = row[0], down
        for across, given in enumerate(first, 1):
            diagonal, row[across] = (
                row[across],
                diagonal if given == wanted else 1 + min(diagonal, row[across], row[across - 1]),
            )
    return row[-1]


def anls(answers: Sequence[str], prediction: str, threshold: float = THRESHOLD) -> float:
    """The similarity of a prediction to the nearest answer, 0 to 1; 0 below `threshold`, and without answers."""
    distances = []
    for answer in answers:
        # In capitals, where a few letters count for two ("ß"): the script's way to count.
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = edit_distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances, default=1.0)
    return similarity if similarity >= threshold else 0.0


def _judge(prediction: Prediction) -> float:
    return anls(texts(prediction, "answers"), prediction.reply)


VARIANTS = {
    variant: Metric("anls", variant, each(_judge, "similarity"), (Score("ANLS", mean("similarity")),))
    for variant in ("official", "qwenvl", "vlmevalkit")
}
