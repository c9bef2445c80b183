"""What a judge is asked of a prediction, and what becomes of its replies: by metric, in text alone.

The wordings are this project's own, after the published definitions. A number depends on the judge and on its words, so
that those made with another judge, or another wording, are not comparable.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenvl_jax.evaluation.metrics.reading import field, text
from qwenvl_jax.evaluation.metrics.touchstone import scores_of
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Prediction

TWO_ANSWERS = """\
Two assistants were shown a picture, or several, and asked a question about it. You do not see it: below is what a \
person wrote who described it in detail, and that description is right.

## Description
{annotation}

## Question
{question}

## Answer of assistant 1
{first}

## Answer of assistant 2
{second}

Rate both answers from 1 to 10, 10 being best, by how helpful, relevant, accurate and comprehensive they are. What the \
description contradicts is not accurate. Which of them stands first must not matter, nor how long they are.

The first line of your reply holds two numbers and nothing else, with a blank between them: the rating of assistant 1, \
then that of assistant 2. Give your reasons below it, in short."""

FINAL_ANSWER = """\
Below are a question about a picture and somebody's reply to it. Find the final answer in the reply and write it in \
one line, with nothing else: {form}. Do not solve the question yourself and do not correct the reply. If the reply has \
no final answer, write {none}.

## Question
{question}

## Reply
{reply}"""
NONE = "NO ANSWER"
FORMS = {
    "integer": "a whole number, without a unit",
    "float": "a number with its decimals, without a unit",
    "list": "a list in brackets, as [1, 2, 3]",
    "text": "the words of the answer",
}
CHOICE = "the letter of the choice that the reply takes, as (A)"


@dataclasses.dataclass(frozen=True)
class Judging:
    """How a metric's predictions are judged.

    prompt: for the manifest. needed: there is no score without. ask: the texts for the judge about a prediction with a
    reply, in order. understood: whether a reply of the judge's can be read. kept: what the replies, None where there is
    none, add to the reference.
    """

    prompt: str
    needed: bool
    ask: Callable[[Prediction], Sequence[str]]
    understood: Callable[[str], bool]
    kept: Callable[[Sequence[str | None]], Mapping[str, Any]]
    decoding: Decoding = dataclasses.field(default_factory=Decoding)


def both_orders(prediction: Prediction) -> list[str]:
    """The reference answer first, then the model's first."""
    answers = text(field(prediction, "gpt4_ha_answer")), prediction.reply
    about = {"annotation": text(field(prediction, "human_annotation")), "question": text(field(prediction, "question"))}
    return [_plain(TWO_ANSWERS, first=a, second=b, **about) for a, b in (answers, answers[::-1])]


def final_answer(prediction: Prediction) -> list[str]:
    """None where nothing was said."""
    if not prediction.reply.strip():
        return []
    is_choice = field(prediction, "question_type") == "multi_choice"
    form = CHOICE if is_choice else FORMS.get(text(field(prediction, "answer_type")), FORMS["text"])
    return [_plain(FINAL_ANSWER, form=form, none=NONE, question=prediction.question, reply=prediction.reply)]


def extracted(replies: Sequence[str | None]) -> dict[str, str]:
    """The extraction in a judge's reply; nothing where there is none to read, which leaves it to the rules."""
    lines = (replies[0] or "").strip().splitlines() if replies else []
    if not lines:
        return {}
    found = lines[0].strip()
    return {"extraction": "" if found.strip(".").upper() == NONE else found}


def _plain(template: str, **parts: str) -> str:
    """The template with its parts, in which no picture is meant to stand."""
    return template.format(**parts).replace(PICTURE, "<img> </img>")


JUDGINGS = {
    "touchstone": Judging(
        TWO_ANSWERS,
        True,
        both_orders,
        lambda reply: scores_of(reply) is not None,
        lambda replies: {"judgements": list(replies)},
        Decoding(max_new_tokens=512),
    ),
    "mathvista": Judging(
        FINAL_ANSWER, False, final_answer, lambda reply: bool(reply.strip()), extracted, Decoding(max_new_tokens=64)
    ),
}
