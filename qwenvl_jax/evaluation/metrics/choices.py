"""Multiple choice: the likeliest choice, or the letter that a reply names (ScienceQA, AI2D, MMStar, RealWorldQA).

choice_accuracy and mmstar: reference {"answer": number of the right choice, 0 = A, "choices": [str, ...]}; reads
Prediction.choice, and the reply where that is None. Usual groups: category, l2_category. MMStar's number is that of all
questions; its six categories have the same size, so it is their mean as well.

realworldqa: reference {"answer": letter or word, "choices": [str, ...]}, choices empty where a question is open; an
open answer must be the reply, but for case, blanks and a full stop.

The letter is found as VLMEvalKit finds it without a judge (`choice_of`); where it finds none, the reply is wrong.
"""

import re
import string
from collections.abc import Sequence

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, field, number, text, texts
from qwenvl_jax.evaluation.task import Prediction

LETTERS = string.ascii_uppercase
NO_ANSWER = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
LAST_WORDS = 4  # a lone letter counts among these: further ahead it may be an article
_TO_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def choice_of(reply: str, choices: Sequence[str]) -> int | None:
    """Which of the choices a reply takes: by letter, else the only one whose text occurs. None where unclear."""
    letters = LETTERS[: len(choices)]
    if NO_ANSWER not in reply:
        if any(refusal in reply for refusal in REFUSALS):
            return None
        words = reply.translate(_TO_BLANKS).split()
        named = [letter for letter in letters if letter in words]
        if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
            return letters.index(named[0])
        if not named and "Z" in words:  # how a judge says "none of them"
            return None
        sentence = _SENTENCE.search(reply)
        if sentence and sentence[1].upper() in letters:
            return letters.index(sentence[1].upper())
    reply = reply.lower()
    if len(reply) > 2 * sum(map(len, choices)):
        return None
    occurring = [place for place, choice in enumerate(choices) if choice.lower() in reply]
    return occurring[0] if len(occurring) == 1 else None


def chosen(prediction: Prediction) -> int | None:
    """The number of the choice that a prediction takes; None where it takes none, or failed."""
    if prediction.error is not None:
        return None
    if prediction.choice is not None:
        return prediction.choice
    return choice_of(prediction.reply, texts(prediction, "choices"))


def right_choice(prediction: Prediction) -> bool:
    """Whether a prediction takes the right choice."""
    return chosen(prediction) == number(prediction, "answer")


def open_match(answer: str, reply: str) -> bool:
    """Whether a reply is an answer in words, but for case, blanks around and a full stop."""
    return reply.strip().rstrip(".").strip().lower() == answer.strip().lower()


def _realworldqa_right(prediction: Prediction) -> bool:
    answer, choices = text(field(prediction, "answer")).strip(), texts(prediction, "choices")
    if not choices:
        return open_match(answer, prediction.reply)
    if answer.upper() not in LETTERS[: len(choices)] or len(answer) != 1:
        raise UserError(f"prediction {prediction.id!r}: 'answer' of its reference must be a letter, not {answer!r}")
    return chosen(prediction) == LETTERS.index(answer.upper())


def _accuracy(name: str, variant: str) -> Metric:
    return Metric(name, variant, each(right_choice), (Score("accuracy", mean("right")),))


CHOICE_ACCURACY = {variant: _accuracy("choice_accuracy", variant) for variant in ("official", "qwenvl", "vlmevalkit")}
MMSTAR = {variant: _accuracy("mmstar", variant) for variant in ("official", "vlmevalkit")}
REALWORLDQA = {
    variant: Metric("realworldqa", variant, each(_realworldqa_right), (Score("accuracy", mean("right")),))
    for variant in ("official", "vlmevalkit")
}
