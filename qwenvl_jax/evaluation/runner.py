"""Asks a model all samples of a dataset, many at once, and keeps the answers as soon as they are there.

Which samples share a batch depends on the dataset alone: where some of a batch were answered before, it is asked again
as a whole, so that every answer is that of an undisturbed run to the last bit.
A sample that cannot be asked (its picture is missing or broken, its prompt too long) gets a prediction with an error,
and the run goes on; where the model is gone it ends, and the next one goes on from what was kept.
"""

import dataclasses
import hashlib
import io
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.predictions import Part, Pictures
from qwenvl_jax.evaluation.task import Prediction, Sample


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
    """What can be evaluated. at_once: how many threads may wait for answers; together: most samples of one call."""

    at_once: int
    together: int

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises UserError where none of them can be asked."""

    def length(self, sample: Sample) -> int:
        """How long its prompt is, by any measure."""

    def answers(self, samples: Sequence[Sample]) -> Sequence[Answer | UserError]:
        """What it says to each, or why that cannot be asked. Raises Lost where the model is gone."""


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
) -> Counts:
    """Asks what `part` lacks. say: is told after every answer. Raises Lost, with all answers so far kept."""
    done = set(part.done)
    counts = Counts(len(samples), sum(sample.id in done for sample in samples))
    say(counts)
    if counts.done == counts.total:
        return counts
    model.check(samples)
    stopping = threading.Event()

    def ask(batch: Sequence[Sample]) -> list[Prediction]:
        return [] if stopping.is_set() else predicted(batch, model, pictures)

    # Few are waiting in the pool, so that an interrupted run ends soon.
    queue = (batch for batch in batches(samples, model) if any(sample.id not in done for sample in batch))
    with ThreadPoolExecutor(model.at_once) as pool:
        try:
            running: set[Future[list[Prediction]]] = set()
            while True:
                while len(running) < 2 * model.at_once and (batch := next(queue, None)) is not None:
                    running.add(pool.submit(ask, batch))
                if not running:
                    return counts
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    for prediction in future.result():
                        if prediction.id in done:
                            continue
                        part.append(prediction)
                        counts.done, counts.asked = counts.done + 1, counts.asked + 1
                        counts.failed += prediction.error is not None
                        counts.tokens += prediction.tokens
                        say(counts)
        finally:
            stopping.set()


def predicted(samples: Sequence[Sample], model: Model, pictures: Pictures) -> list[Prediction]:
    """The predictions of samples that are asked together. Raises Lost."""
    answers = model.answers(samples)
    return [_prediction(sample, answer, pictures) for sample, answer in zip(samples, answers, strict=True)]


def _prediction(sample: Sample, answer: Answer | UserError, pictures: Pictures) -> Prediction:
    names = tuple(pictures.name(picture) for picture in sample.pictures)
    prediction = Prediction(
        sample.id, "", sample.reference, sample.groups, sample.question or sample.prompt, pictures=names
    )
    if isinstance(answer, UserError):
        return dataclasses.replace(prediction, error=str(answer))
    if not sample.choices:
        return dataclasses.replace(
            prediction, reply=answer.text, finish_reason=answer.finish_reason, tokens=answer.tokens
        )
    choice = int(np.argmax(answer.likelihoods))
    return dataclasses.replace(
        prediction, reply=sample.choices[choice].strip(), choice=choice, likelihoods=answer.likelihoods
    )


def batches(samples: Iterable[Sample], model: Model) -> list[list[Sample]]:
    """Samples that are asked together: questions about the same pictures, since those are read once, and beside them
    others of like length. The longest come first, since what does not fit fails at once."""
    groups: dict[tuple, list[tuple[int, Sample]]] = {}
    for sample in samples:
        groups.setdefault(sample.pictures, []).append((model.length(sample), sample))
    longest = sorted(groups.values(), key=lambda group: -max(length for length, _ in group))
    found: list[list[Sample]] = [[]]
    for group in longest:
        ordered = [sample for _, sample in sorted(group, key=lambda pair: -pair[0])]
        if found[-1] and len(found[-1]) + len(ordered) > model.together:
            found.append([])
        for start in range(0, len(ordered), model.together):
            if start:
                found.append([])
            found[-1] += ordered[start : start + model.together]
    return [batch for batch in found if batch]


def blind(sample: Sample) -> Sample:
    """The sample with grey noise in place of its pictures: what it gets is what the question gives away.

    Each picture has a noise of its own, so that questions about one picture still belong together, and no others do.
    """
    return dataclasses.replace(sample, pictures=tuple(map(_noise, sample.pictures)))


def _noise(picture: Path | bytes) -> bytes:
    digest = hashlib.sha256(picture if isinstance(picture, bytes) else str(picture).encode()).digest()
    grey = np.random.default_rng(list(digest)).normal(128, 40, (96, 96)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(file, "PNG")
    return file.getvalue()
