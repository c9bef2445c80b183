"""MathVista: mathematics in pictures; the answer is extracted from the reply first (Lu et al. 2024).

reference: {"question_type": "multi_choice" or "free_form", "answer_type": "text", "integer", "float" or "list",
"precision": decimals of a float or null, "answer": str, "choices": [str, ...], empty for free form, "extraction": str,
only where a judge extracted the answer}. Reads the reply, or the extraction. Usual groups: task, context, category.

The official evaluation has GPT-4 extract the answer. Without an extraction in the reference `extract` does it by
rules: the official ones for replies that are just an answer, then the letter of a choice, or the last number or list.
Such a score is not comparable with those that a judge helped to. An answer that could not be extracted is wrong (the
official option ignore_empty_extractions).
"""

import re
from collections.abc import Sequence
from typing import Any

from qwenvl_jax.evaluation.metrics.anls import edit_distance
from qwenvl_jax.evaluation.metrics.choices import LETTERS, choice_of
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, field, text, texts
from qwenvl_jax.evaluation.task import Prediction

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_LIST = re.compile(r"\[[^\[\]]*\]")
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def extract(reply: str, question_type: str, answer_type: str, choices: Sequence[str] = ()) -> str:
    """The answer in a reply, by rules; "" where none is found."""
    if question_type == "multi_choice" and reply in choices:
        return reply
    try:
        if answer_type == "integer":
            return str(int(reply))
        if answer_type == "float":
            return str(float(reply))
    except ValueError:
        pass
    quoted = _QUOTED.search(reply)
    if quoted:
        return quoted[1]
    if question_type == "multi_choice":
        letters = _LETTER.findall(reply)
        place = choice_of(reply, choices)
        if place is not None:
            return LETTERS[place]
        return letters[-1].upper() if letters and letters[-1].upper() in LETTERS[: len(choices)] else ""
    if answer_type == "list":
        lists = _LIST.findall(reply)
        return lists[-1] if lists else ""
    if answer_type in ("integer", "float"):
        numbers = _NUMBER.findall(reply)
        return numbers[-1].replace(",", "") if numbers else ""
    return reply.strip()


def normalised(
    extraction: str, question_type: str, answer_type: str, choices: Sequence[str] = (), precision: float | None = None
) -> str | None:
    """An extracted answer in the form of the right one: a choice's text, or a number as str; None where it is none.

    What is neither the letter nor the text of a choice is the nearest by edit distance, as in the official evaluation.
    """
    if question_type == "multi_choice":
        extraction = extraction.strip()
        if not extraction or not choices:
            return None
        letters = _LETTER.findall(extraction)
        if letters:
            extraction = letters[0].upper()
        if len(extraction) == 1 and extraction in LETTERS[: len(choices)]:
            return choices[LETTERS.index(extraction)]
        return min(choices, key=lambda choice: edit_distance(extraction, choice))
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(precision)))  # type: ignore[arg-type]
    except (ValueError, OverflowError, TypeError):  # nan and inf are no whole numbers, and a precision may be missing
        return None
    return extraction


def _right(prediction: Prediction) -> bool:
    fields: dict[str, Any] = {name: field(prediction, name) for name in ("question_type", "answer_type")}
    fields["choices"] = texts(prediction, "choices") if prediction.reference.get("choices") else ()
    extraction = prediction.reference.get("extraction")
    if extraction is None:
        extraction = extract(prediction.reply, **fields)
    found = normalised(text(extraction), **fields, precision=prediction.reference.get("precision"))
    return found == text(field(prediction, "answer"))


VARIANTS = {
    "official": Metric(
        "mathvista",
        "official",
        each(_right),
        (Score("accuracy", mean("right")),),
        "answers without a judge's extraction are found by rules",
    )
}
