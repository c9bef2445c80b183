"""Asks a model all samples of a dataset, many at once, and keeps each answer as soon as it is there.

A sample that cannot be asked (its picture is missing or broken, its prompt too long) gets a prediction with an error,
and the run goes on; where the model is gone it ends, and the next one goes on from what was kept.
"""

import dataclasses
import io
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.predictions import Part, Pictures
from qwenvl_jax.evaluation.task import Prediction, Sample

Say = Callable[[int, int], None]  # how many of how many


class Lost(Exception):
    """The model answers nothing any more; its message is for people."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said: a text, or the mean log-likelihood per token of each choice."""

    text: str = ""
    likelihoods: tuple[float, ...] = ()
    finish_reason: str | None = None
    tokens: int = 0


class Model(Protocol):
    """What can be evaluated. at_once: how many threads may wait for an answer."""

    at_once: int

    def prepare(self, samples: Sequence[Sample], say: Say) -> None:
        """Gets ready for these samples."""

    def length(self, sample: Sample) -> int:
        """How long its prompt is, by any measure."""

    def answer(self, sample: Sample) -> Answer:
        """Raises UserError for a sample that cannot be asked, Lost where the model is gone."""


@dataclasses.dataclass
class Counts:
    """How far a run is. asked: answered in this run."""

    total: int
    done: int = 0
    asked: int = 0
    failed: int = 0
    tokens: int = 0


def predict(
    samples: Sequence[Sample],
    model: Model,
    part: Part,
    pictures: Pictures,
    say: Callable[[Counts], None] = lambda counts: None,
    preparing: Say = lambda done, of: None,
) -> Counts:
    """Asks what `part` lacks. say: is told after every answer. Raises Lost, with all answers so far kept."""
    left = [sample for sample in samples if sample.id not in part.done]
    counts = Counts(len(samples), len(samples) - len(left))
    say(counts)
    if not left:
        return counts
    model.prepare(left, preparing)
    stopping = threading.Event()

    def one(sample: Sample) -> Prediction | None:
        return None if stopping.is_set() else predicted(sample, model, pictures)

    # Few are waiting in the pool, so that an interrupted run ends soon.
    queue = iter(in_order(left, model))
    with ThreadPoolExecutor(model.at_once) as pool:
        try:
            running: set[Future[Prediction | None]] = set()
            while True:
                while len(running) < 2 * model.at_once and (sample := next(queue, None)) is not None:
                    running.add(pool.submit(one, sample))
                if not running:
                    return counts
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    if (prediction := future.result()) is not None:
                        part.append(prediction)
                        counts.done, counts.asked = counts.done + 1, counts.asked + 1
                        counts.failed += prediction.error is not None
                        counts.tokens += prediction.tokens
                        say(counts)
        finally:
            stopping.set()


def predicted(sample: Sample, model: Model, pictures: Pictures) -> Prediction:
    """The prediction of one sample. Raises Lost."""
    names = tuple(pictures.name(picture) for picture in sample.pictures)
    prediction = Prediction(
        sample.id, "", sample.reference, sample.groups, sample.question or sample.prompt, pictures=names
    )
    try:
        answer = model.answer(sample)
    except UserError as error:
        return dataclasses.replace(prediction, error=str(error))
    if not sample.choices:
        return dataclasses.replace(
            prediction, reply=answer.text, finish_reason=answer.finish_reason, tokens=answer.tokens
        )
    choice = int(np.argmax(answer.likelihoods))
    return dataclasses.replace(
        prediction, reply=sample.choices[choice].strip(), choice=choice, likelihoods=answer.likelihoods
    )


def in_order(samples: Iterable[Sample], model: Model) -> list[Sample]:
    """Questions about the same pictures one after another, since those are read once, and the longest of them first:
    like lengths share a batch best, and what does not fit fails at once."""
    groups: dict[tuple, list[tuple[int, Sample]]] = {}
    for sample in samples:
        groups.setdefault(sample.pictures, []).append((model.length(sample), sample))
    longest = sorted(groups.values(), key=lambda group: -max(length for length, _ in group))
    return [sample for group in longest for _, sample in sorted(group, key=lambda pair: -pair[0])]


def blind(sample: Sample) -> Sample:
    """The sample with grey noise in place of its pictures: what it gets is what the question gives away."""
    noise = np.random.default_rng(0).normal(128, 40, (96, 96)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert("RGB").save(file, "PNG")
    return dataclasses.replace(sample, pictures=(file.getvalue(),) * len(sample.pictures))
