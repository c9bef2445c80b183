"""Yes or no: what a reply says to a question that wants one of the two. Shared by MME, POPE and HallusionBench."""

from collections.abc import Callable
from typing import Literal

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.reading import field, text
from qwenvl_jax.evaluation.metrics.vqa_accuracy import PERIOD_OF_NO_NUMBER, without_punctuation
from qwenvl_jax.evaluation.task import Prediction

Answer = Literal["yes", "no", "other"]
Parse = Callable[[str], Answer]


def truth(prediction: Prediction) -> Answer:
    """The right answer of a prediction. Raises UserError where its reference has another."""
    answer = text(field(prediction, "answer")).strip().rstrip(".").lower()
    if answer in ("yes", "1", "true"):
        return "yes"
    if answer in ("no", "0", "false"):
        return "no"
    raise UserError(f"prediction {prediction.id!r}: 'answer' of its reference must be yes or no, not {answer!r}")


def first_characters(reply: str) -> Answer:
    """MME's own: "yes", else "no", among the first four characters."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def first_characters_or_letter(reply: str) -> Answer:
    """lmms-eval's for MME: the same without blanks ahead and full stops; a reply of one letter may be "y" or "n"."""
    reply = reply.lower().strip().replace(".", "")
    if len(reply) == 1:
        return "yes" if reply == "y" else "no" if reply == "n" else "other"
    return first_characters(reply)


def only_word(reply: str) -> Answer:
    """VLMEvalKit's: the one of the two words that occurs anywhere."""
    words = without_punctuation(reply.lower(), PERIOD_OF_NO_NUMBER).split()
    yes, no = "yes" in words, "no" in words
    return "other" if yes == no else "yes" if yes else "no"


def whole_reply(reply: str) -> Answer:
    """lmms-eval's for POPE: the word alone."""
    reply = reply.lower().strip()
    return "yes" if reply == "yes" else "no" if reply == "no" else "other"


def yes_unless_denied(reply: str) -> Answer:
    """POPE's own: no where the first sentence has "No", "no" or "not" between blanks, else yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"
