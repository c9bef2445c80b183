"""MMMU: questions of thirty subjects, most with choices, some open (Yue et al. 2024).

reference: {"question_type": "multiple-choice" or "open", "answer": letter, or [letter, ...]; of an open question str or
[str, ...], "choices": [str, ...], empty for open questions}. Reads Prediction.choice where it is set, else the reply.
Usual groups: subject, discipline. The number is that of all questions, not the mean of subjects.

official: `parse_choice` and `parse_open`. Where no choice is found the official code draws one, and so do we: with its
seed and in the order of the predictions, so scores are the same each time, and the official ones when the order is.
vlmevalkit: letters as in `choices.choice_of`, never drawn; an open question is one with the choices "its answer" and
"Other Answers". Not here: lmms-eval's variant, which keeps for open questions whichever candidate a set gives first.
"""

import random
import re
from collections.abc import Callable, Sequence

from qwenvl_jax.evaluation.metrics.choices import LETTERS, choice_of
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import each, field, texts
from qwenvl_jax.evaluation.task import Prediction

SEED = 42  # of the official evaluation
MARKS = (",", ".", "!", "?", ";", ":", "'")
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
OTHER_ANSWERS = "Other Answers"


def parse_choice(reply: str, choices: Sequence[str], rng: random.Random) -> str:
    """The letter that a reply takes: "(A)", else " A ", else, in six words or more, a choice's text; the last one.

    Where there is none `rng` draws a letter.
    """
    letters = LETTERS[: len(choices)]
    for mark in MARKS:
        reply = reply.strip(mark)
    reply = f" {reply} "
    lower = reply.lower()
    places = {letter: reply.rfind(f"({letter})") for letter in letters}
    if max(places.values(), default=-1) < 0:
        places = {letter: reply.rfind(f" {letter} ") for letter in letters}
    if max(places.values(), default=-1) < 0 and len(reply.split()) > 5:
        places = {letter: lower.rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=False)}
    found = {letter: place for letter, place in places.items() if place >= 0}
    if found:
        return max(found, key=lambda letter: found[letter])
    return rng.choice(letters) if letters else ""


def as_number(answer: str) -> float | None:
    """The number that a text is, commas left out; None where it is none."""
    try:
        return float(answer.replace(",", ""))
    except ValueError:
        return None


def normalised(answer: str) -> list[str | float]:
    """A number with two decimals, else a text in lower case; a single letter with a blank on either side."""
    answer = answer.strip()
    value = as_number(answer)
    if value is not None:
        return [round(value, 2)]
    answer = answer.lower()
    return [" " + answer, answer + " "] if len(answer) == 1 else [answer]


def key_phrases(reply: str) -> list[str]:
    """What follows the last key word of each line, the shortest of them; the reply where there is none."""
    reply = reply.strip().strip(".").lower()
    # The official code means to part sentences, too, but looks for a capital in a text without capitals.
    lines = reply.split("\n")
    phrases = []
    for place, line in enumerate(lines):
        keys = (*KEYS, "=") if place == len(lines) - 1 else KEYS  # the last may be an equation
        shortest = ""
        for key in keys:
            if key in line:
                tail = line.split(key)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in MARKS:
            phrases.append(shortest)
    return phrases or [reply]


def parse_open(reply: str) -> list[str | float]:
    """The candidates for an answer in a reply: its key phrases and the numbers in them."""
    phrases = key_phrases(reply)
    numbers = [found for phrase in phrases for pattern in _NUMBERS for found in pattern.findall(phrase)]
    return list(dict.fromkeys(form for text in (*phrases, *numbers) for form in normalised(text)))


def open_right(answers: Sequence[str], candidates: Sequence[str | float]) -> bool:
    """Whether a candidate is an answer's number, or has an answer's text inside."""
    forms = [form for answer in answers for form in normalised(answer)]
    words = [form for form in forms if isinstance(form, str)]
    return any(
        any(word in candidate for word in words) if isinstance(candidate, str) else candidate in forms
        for candidate in candidates
    )


def _official(predictions: Sequence[Prediction]) -> Units:
    rng = random.Random(SEED)

    def right(prediction: Prediction) -> bool:
        answers = texts(prediction, "answer")
        if field(prediction, "question_type") != "multiple-choice":
            return open_right(answers, parse_open(prediction.reply))
        choices = texts(prediction, "choices")
        if prediction.choice is not None:
            return LETTERS[prediction.choice] in answers
        return parse_choice(prediction.reply, choices, rng) in answers

    return each(right)(predictions)


def _vlmevalkit_right(prediction: Prediction) -> bool:
    answers = texts(prediction, "answer")
    if field(prediction, "question_type") != "multiple-choice":
        return choice_of(prediction.reply, [answers[0] if answers else "", OTHER_ANSWERS]) == 0
    choice = prediction.choice
    if choice is None:
        choice = choice_of(prediction.reply, texts(prediction, "choices"))
    return choice is not None and LETTERS[choice] in answers


def _metric(variant: str, units: Callable[[Sequence[Prediction]], Units], note: str) -> Metric:
    return Metric("mmmu", variant, units, (Score("accuracy", mean("right")),), note)


VARIANTS = {
    "official": _metric("official", _official, f"where no choice is found one is drawn, with seed {SEED}"),
    "vlmevalkit": _metric(
        "vlmevalkit", each(_vlmevalkit_right), 'an open question is one of two choices, its answer and "Other Answers"'
    ),
}
