"""The words of an evaluation: a task gives samples, a model makes a prediction of each, a metric judges them.

Plain data without jax and without a model, so that predictions can be scored on any machine. Who reads the official
files is in `tasks/`, who asks a model in `runner.py`, who judges in `metrics/`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

PICTURE = "<img></img>"  # where a picture stands in a prompt
Style = Literal["qwenvl", "chat"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question to a model.

    id: unique within its dataset. prompt: with PICTURE where each of `pictures` (files, or the bytes of one) stands.
    reference: what the metric compares the reply with, as JSON. choices: continuations of the prompt, leading blank
    included, the likeliest of which is the answer; without them text is generated. groups: labels by which scores are
    broken down, {"category": "OCR"}. question: what a report shows; the prompt where it is empty.
    """

    id: str
    prompt: str
    pictures: tuple[Path | bytes, ...]
    reference: Mapping[str, Any]
    choices: tuple[str, ...] = ()
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    question: str = ""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model said to a sample; a line of a predictions file, and all that a metric sees.

    reply: the text; of a sample with choices the likeliest one, without blanks around it. choice: its number.
    likelihoods: mean log-likelihood per token of each choice. pictures: for reports, the path of each, or a file name
    beside the predictions. error: why there is no reply; such a prediction counts as wrong, and is counted.
    """

    id: str
    reply: str
    reference: Mapping[str, Any]
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    question: str = ""
    choice: int | None = None
    likelihoods: tuple[float, ...] = ()
    pictures: tuple[str, ...] = ()
    finish_reason: str | None = None
    tokens: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How replies are generated; greedy unless a temperature is given."""

    max_new_tokens: int = 10
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a dataset's files become samples.

    style: "qwenvl" for the raw prompts of the original's scripts, which base models know, "chat" for the instructions
    that chat models and other servers follow. generate: have multiple choice answered in words and not by likelihood.
    few_shot: worked examples before each question, drawn with `seed`.
    """

    style: Style = "qwenvl"
    generate: bool = False
    few_shot: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset with everything that asking and judging need to know of it.

    name: as `--dataset` has it. files: what `read` expects under the data folder, for errors and docs. read: the
    samples, in the order of the file; raises UserError that names what is missing or malformed. metric: a name in
    `metrics.registry`, "" where the answers are kept by a server. decoding: by style, where it is not the same.
    chats: its prompts are messages to a model that chats, in either style.
    """

    name: str
    family: str
    files: tuple[str, ...]
    read: Callable[[Path, Reading], Iterable[Sample]]
    metric: str
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    chat_decoding: Decoding | None = None
    chats: bool = False
