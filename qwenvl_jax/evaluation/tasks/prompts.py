"""What a model is asked, in both styles, and how worked examples and multiple choice are written.

"qwenvl": the raw prompts of the original's scripts, character for character. "chat": the question and the instruction
that the benchmark's users give to chat models; LLaVA-1.5 made most of the closing lines common.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import PICTURE, Reading

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CAPTION = PICTURE + "Describe the image in English:"
GROUNDING = PICTURE + "<ref>{}</ref><box>"

CHAT_CAPTION = PICTURE + "Describe the picture in one short sentence."
CHAT_GROUNDING = PICTURE + "Give the bounding box of what this describes: {}"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
YES_OR_NO = "\nPlease answer yes or no."
CHOOSE = "Answer with the option's letter from the given choices directly."
CHOOSE_CHINESE = "请直接回答选项字母。"  # the closing line that VLMEvalKit gives to Qwen models

_CHINESE = re.compile("[\u4e00-\u9fff]")
Item = TypeVar("Item")


def vqa(reading: Reading, question: str, closing: str = SHORT_ANSWER) -> str:
    """A question that is answered in a few words."""
    return f"{PICTURE}{question} Answer:" if reading.style == "qwenvl" else f"{PICTURE}{question}{closing}"


def yes_or_no(reading: Reading, question: str) -> str:
    """A question for yes or no. Those that ask for it in their own words are left as they stand."""
    asks = YES_OR_NO.strip().rstrip(".").lower() in question.lower()
    return vqa(reading, question, "" if asks else YES_OR_NO)


def options_text(choices: Sequence[str]) -> str:
    """A line for each choice: "A. text"."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def multiple_choice(
    reading: Reading, question: str, choices: Sequence[str], hint: str = "", pictures: int = 1, context: bool = True
) -> str:
    """A question with lettered options.

    context: in style "qwenvl", the form of ScienceQA and MMBench, which begins with the hint ("N/A" where there is
    none); otherwise that of SEED-Bench, where a line break follows each picture.
    """
    if reading.style == "qwenvl":
        shown = PICTURE * pictures + f"Context: {hint or 'N/A'}\n" if context else (PICTURE + "\n") * pictures
        return f"{shown}Question: {question}\nOptions: {options_text(choices)}\nAnswer:"
    body = f"Hint: {hint}\n" * bool(hint) + f"Question: {question}\nOptions:\n{options_text(choices)}\n"
    return PICTURE * pictures + body + (CHOOSE_CHINESE if _CHINESE.search(body) else CHOOSE)


def continuations(reading: Reading, count: int) -> tuple[str, ...]:
    """What is ranked by likelihood: " A", " B", ...; nothing where the answer is generated."""
    if reading.style == "chat" or reading.generate:
        return ()
    return tuple(f" {letter}" for letter in LETTERS[:count])


def worked_examples(
    reading: Reading, load: Callable[[], Sequence[Item]], render: Callable[[Item], tuple[str, Path]]
) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """For each question in turn, the text and the pictures that stand before it.

    As in the original: for each question anew, `few_shot` different records of the training file drawn by Python's
    `random` from the seed, each the same prompt, a blank and its answer, with nothing in between. `render` gives that
    text and the picture of a record.
    """
    if not reading.few_shot:
        while True:
            yield "", ()
    if reading.style != "qwenvl":
        raise UserError("worked examples belong to raw prompts; ask in style qwenvl, or without them")
    records = load()
    if reading.few_shot > len(records):
        raise UserError(f"{reading.few_shot} worked examples are asked for, and the training file holds {len(records)}")
    draw = random.Random(reading.seed)
    while True:
        chosen = [render(records[i]) for i in draw.sample(range(len(records)), reading.few_shot)]
        yield "".join(text for text, _ in chosen), tuple(picture for _, picture in chosen)
