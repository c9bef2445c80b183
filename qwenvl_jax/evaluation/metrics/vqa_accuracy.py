"""VQA accuracy: an answer is right as far as people agree with it (Antol et al. 2015; VQAv2, OK-VQA, VizWiz, TextVQA).

reference: {"answers": [str, ...]}, by rule those of ten people. Reads the reply. Usual groups:
question_type, answer_type.

Of the other nine answers three equal ones are enough: mean over i of min(1, #{j != i: answer j = prediction} / 3). What
differs between the evaluations is what is normalised before answers are compared:

official: prediction and answers, unless all answers are the same string.
qwenvl: the prediction always, fully; answers only by punctuation, and only unless all are the same.
vlmevalkit: all, always; a "." beside a digit stays.
lmms_eval: all, always.
textvqa: all, always, through MMF's processor, which parts "'s" and drops "," and "?" first; what TextVQA's own
evaluation and, for that dataset, lmms_eval use.
"""

import functools
import re
from collections.abc import Callable, Sequence

from qwenvl_jax.evaluation.metrics.contractions import CONTRACTIONS
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, texts
from qwenvl_jax.evaluation.task import Prediction

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
# The official pattern means to keep the "." of a number, but looks only ahead: "3." loses it, "3.5" and ".5" do not.
# Its flag stands where the number of replacements does, and is 32.
PERIOD = re.compile(r"\.(?!\d)")
PERIOD_OF_NO_NUMBER = re.compile(r"(?<!\d)\.(?!\d)")
MOST_PERIODS = 32


@functools.lru_cache(maxsize=2**16)  # the same few answers come again and again
def without_punctuation(answer: str, period: re.Pattern[str] = PERIOD, comma: re.Pattern[str] = COMMA_IN_NUMBER) -> str:
    """Marks go beside a blank, or where a number has a comma; others become a blank. Then full stops go."""
    large_number = comma.search(answer) is not None
    result = answer
    for mark in PUNCTUATION:
        goes = large_number or mark + " " in answer or " " + mark in answer
        result = result.replace(mark, "" if goes else " ")
    return period.sub("", result, count=MOST_PERIODS)


def without_articles(answer: str) -> str:
    """In lower case, number words as digits, without articles, contractions with their apostrophe."""
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(answer: str) -> str:
    """Without line breaks, tabs, and blanks around."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=2**16)
def normalised(answer: str, period: re.Pattern[str] = PERIOD, comma: re.Pattern[str] = COMMA_IN_NUMBER) -> str:
    """All steps of the official evaluation."""
    return without_articles(without_punctuation(one_line(answer), period, comma))


def vlmevalkit_normalised(answer: str) -> str:
    """The same as VLMEvalKit has it."""
    return normalised(answer, period=PERIOD_OF_NO_NUMBER)


def lmms_eval_normalised(answer: str) -> str:
    """The same as lmms-eval has it: several commas in a row are a number's, too."""
    return normalised(answer, comma=COMMAS_IN_NUMBER)


def mmf_normalised(answer: str) -> str:
    """An answer as MMF's processor has it."""
    return lmms_eval_normalised(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def agreement(answers: Sequence[str], prediction: str) -> float:
    """How far people agree with a prediction, 0 to 1, both as they are; nobody (no answers) agrees with anything."""
    equal = sum(answer == prediction for answer in answers)
    # Leaving out an equal answer leaves one fewer to agree with.
    shares = [min(1.0, (equal - (answer == prediction)) / 3) for answer in answers]
    return sum(shares) / len(shares) if shares else 0.0


def vqa_accuracy(answers: Sequence[str], prediction: str) -> float:
    """The official accuracy of a prediction, 0 to 1."""
    answers, prediction = [one_line(answer) for answer in answers], one_line(prediction)
    if len(set(answers)) > 1:
        answers, prediction = [normalised(answer) for answer in answers], normalised(prediction)
    return agreement(answers, prediction)


def qwenvl_accuracy(answers: Sequence[str], prediction: str) -> float:
    """The accuracy as Qwen-VL's evaluation computes it, 0 to 1."""
    if len(set(answers)) > 1:
        answers = [without_punctuation(answer) for answer in answers]
    return agreement(answers, normalised(prediction))


def always_normalised(answers: Sequence[str], prediction: str, normalise: Callable[[str], str]) -> float:
    """The accuracy with everything normalised, 0 to 1."""
    return agreement([normalise(answer) for answer in answers], normalise(prediction))


def _metric(variant: str, accuracy: Callable[[Sequence[str], str], float], note: str = "") -> Metric:
    def judge(prediction: Prediction) -> float:
        return accuracy(texts(prediction, "answers"), prediction.reply)

    return Metric("vqa_accuracy", variant, each(judge, "accuracy"), (Score("VQA accuracy", mean("accuracy")),), note)


VARIANTS = {
    "official": _metric("official", vqa_accuracy),
    "qwenvl": _metric(
        "qwenvl", qwenvl_accuracy, "answers keep case, articles and number words; the prediction is always normalised"
    ),
    "vlmevalkit": _metric(
        "vlmevalkit",
        functools.partial(always_normalised, normalise=vlmevalkit_normalised),
        "always normalised; a full stop after a digit stays",
    ),
    "lmms_eval": _metric(
        "lmms_eval", functools.partial(always_normalised, normalise=lmms_eval_normalised), "always normalised"
    ),
    "textvqa": _metric(
        "textvqa",
        functools.partial(always_normalised, normalise=mmf_normalised),
        "MMF's processor, as TextVQA's own evaluation and lmms-eval have it for that dataset",
    ),
}
