"""Exact match: the reply is one of the answers, in any case (OCR-VQA, AI2D, and GQA).

reference: {"answers": [str, ...]}. Reads the reply.

exact_match: all variants are the same.
gqa, official: the same; GQA's own evaluation (Hudson and Manning 2019) compares strings that were made ready for it.
gqa, qwenvl: a sentence is first cut down to its answer, as Qwen-VL's evaluation does.
gqa, lmms_eval: punctuation is dropped from both.
"""

import string
from collections.abc import Callable, Sequence

from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, texts
from qwenvl_jax.evaluation.task import Prediction

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answers: Sequence[str], prediction: str) -> bool:
    """Whether a prediction is one of the answers, but for case and blanks around."""
    return prediction.strip().lower() in {answer.strip().lower() for answer in answers}


def gqa_answer(reply: str) -> str:
    """What is left of a sentence as an answer: up to a mark, after the verb and the articles, before "of".

    What is kept after a word is only what stands before its next occurrence; and the words are found inside others, too
    ("this " has "is "). That is the original's way.
    """
    reply = reply.strip()
    for mark in ".,!":
        reply = reply.split(mark)[0]
    reply = reply.lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        if word in reply:
            reply = reply.split(word)[1]
    return reply.split(" of")[0].strip()


def gqa_accuracy(answers: Sequence[str], prediction: str) -> bool:
    """Exact match after Qwen-VL's clean-up of the prediction."""
    return exact_match(answers, gqa_answer(prediction))


def unpunctuated_match(answers: Sequence[str], prediction: str) -> bool:
    """Exact match without punctuation."""
    return exact_match([answer.translate(NO_PUNCTUATION) for answer in answers], prediction.translate(NO_PUNCTUATION))


def _metric(name: str, variant: str, right: Callable[[Sequence[str], str], bool], note: str = "") -> Metric:
    def judge(prediction: Prediction) -> float:
        return right(texts(prediction, "answers"), prediction.reply)

    return Metric(name, variant, each(judge), (Score("accuracy", mean("right")),), note)


EXACT_MATCH = {
    variant: _metric("exact_match", variant, exact_match) for variant in ("official", "qwenvl", "vlmevalkit")
}
GQA = {
    "official": _metric("gqa", "official", exact_match),
    "qwenvl": _metric("gqa", "qwenvl", gqa_accuracy, "a sentence is cut down to its answer first"),
    "lmms_eval": _metric("gqa", "lmms_eval", unpunctuated_match, "punctuation does not count"),
}
