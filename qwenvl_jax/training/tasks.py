"""Datasets that the model answers while it is trained, read, asked and scored as the scripts in `eval/` do.

Predictions are kept under `evaluation/STEP/TASK.jsonl` in the run's folder, scores go into its log. As with samples,
nothing in the run changes by it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import runner
from qwenvl_jax.evaluation.judgings import JUDGINGS
from qwenvl_jax.evaluation.local_model import messages, options_of
from qwenvl_jax.evaluation.metrics import registry as metrics
from qwenvl_jax.evaluation.predictions import Part, Pictures, read_predictions
from qwenvl_jax.evaluation.runner import Answer
from qwenvl_jax.evaluation.scores import score, to_json
from qwenvl_jax.evaluation.task import Decoding, Prediction, Reading, Sample, Style, Task
from qwenvl_jax.evaluation.tasks import registry
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.vlm import VLM, Reply


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task and those of its samples that the recipe wants. chats: they are messages and no raw prompts."""

    task: Task
    samples: Sequence[Sample]
    chats: bool

    @property
    def decoding(self) -> Decoding:
        return (self.task.chat_decoding if self.chats else None) or self.task.decoding


def open_tasks(recipe: Recipe) -> list[Asked]:
    """The tasks of a recipe with their samples. Raises UserError for one that is not there, or cannot be scored."""
    wanted = recipe.evaluate
    # What learns conversations is asked in chat messages, what learns bare text by the original's raw prompts.
    chats = recipe.records is None or recipe.records.template == "chat"
    style: Style = "chat" if chats else "qwenvl"
    found = []
    for name in wanted.tasks:
        try:
            task = registry.task(name)
        except UserError as error:
            raise UserError(f"evaluate.tasks: {error}") from None
        if not task.metric or (task.metric in JUDGINGS and JUDGINGS[task.metric].needed):
            why = "a judge scores it" if task.metric else "its answers are kept by a server"
            raise UserError(f"evaluate.tasks: {name} cannot be scored while training, {why}")
        samples = list(itertools.islice(task.read(Path(wanted.data), Reading(style)), wanted.limit))
        if not samples:
            raise UserError(f"evaluate.tasks: {name} has no samples in {wanted.data}")
        # A reference that the metric cannot read, or a program that it lacks, must not end a run that has begun.
        metrics.metric(task.metric).units([Prediction(one.id, "", one.reference, one.groups) for one in samples])
        found.append(Asked(task, samples, chats))
    return found


class Tasks:
    """Asks the tasks of a run and keeps what was answered under `folder`/STEP."""

    def __init__(self, asked: Sequence[Asked], folder: Path):
        self.asked, self._folder = list(asked), folder

    def answer(self, vlm: VLM, step: int, tell: Callable[[str], None]) -> dict[str, float]:
        """{"TASK/SCORE": value} of the model as it is now. tell: is told of samples that could not be asked."""
        scores: dict[str, float] = {}
        for asked in self.asked:
            name = asked.task.name
            path = self._folder / str(step) / f"{name}.jsonl"
            manifest = {
                "task": name,
                "metric": asked.task.metric,
                "samples": len(asked.samples),
                "style": "chat" if asked.chats else "qwenvl",
                "decoding": dataclasses.asdict(asked.decoding),
                "step": step,
            }
            # Of a run that was killed before its checkpoint, this step's predictions are made once more.
            with Part(path, manifest, overwrite=True) as part:
                pictures = Pictures(path, self._folder / f"{name}.pictures")
                counts = runner.predict(asked.samples, Batched(vlm, asked), part, pictures)
            part.finish([sample.id for sample in asked.samples])
            if counts.failed:
                tell(f"{name}: {counts.failed} of {counts.total} samples could not be asked, see {path}")
            found = score(read_predictions(path)[1], metrics.metric(asked.task.metric))
            path.with_suffix(".scores.json").write_text(to_json(found) + "\n", encoding="utf-8")
            scores |= {f"{name}/{number.name}": number.value for number in found.numbers}
        return scores


class Batched:
    """A model for `runner.predict` that answers everything in `prepare`, by the programs that answer a run's samples.

    An engine would be faster, but keeps memory and has programs of its own, which a training run would compile anew
    at each evaluation.
    """

    at_once = 1

    def __init__(self, vlm: VLM, asked: Asked):
        self._vlm, self._asked = vlm, asked
        self._answers: dict[str, Answer | UserError] = {}

    def length(self, sample: Sample) -> int:
        return len(sample.prompt)

    def prepare(self, samples: Sequence[Sample], say: runner.Say) -> None:
        """Asks all; one that cannot be asked must not take the others with it."""
        if not self._asked.chats:
            self._answers = {sample.id: self._raw(sample) for sample in samples}
            return
        ready = []
        for sample in samples:
            try:
                self._check(len(self._vlm.processor.chat(messages(sample)).input_ids))
                ready.append(sample)
            except UserError as error:
                self._answers[sample.id] = error
        replies = self._vlm.batch([messages(sample) for sample in ready], **self._options())
        self._answers |= {sample.id: _answer(reply) for sample, reply in zip(ready, replies, strict=True)}

    def answer(self, sample: Sample) -> Answer:
        """What was found in `prepare`. Raises UserError for a sample that could not be asked."""
        found = self._answers[sample.id]
        if isinstance(found, UserError):
            raise found
        return found

    def _raw(self, sample: Sample) -> Answer | UserError:
        try:
            if sample.choices:
                scores = self._vlm.score(sample.prompt, sample.choices, sample.pictures, per_token=True)
                return Answer(likelihoods=tuple(map(float, scores)))
            return _answer(self._vlm.generate(sample.prompt, sample.pictures, **self._options()))
        except UserError as error:
            return error

    def _options(self) -> dict:
        return {"repetition_penalty": 1.0} | options_of(self._asked.decoding)

    def _check(self, length: int) -> None:
        most = self._vlm.config.max_position_embeddings
        if length >= most:
            raise UserError(f"the prompt has {length} tokens; the model has {most} positions")


def _answer(reply: Reply) -> Answer:
    return Answer(reply.text.strip(), finish_reason=reply.finish_reason, tokens=reply.usage.completion_tokens)
