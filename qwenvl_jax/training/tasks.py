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
from qwenvl_jax.evaluation.local_model import LocalModel
from qwenvl_jax.evaluation.metrics import registry as metrics
from qwenvl_jax.evaluation.predictions import Part, Pictures, read_predictions
from qwenvl_jax.evaluation.scores import score, to_json
from qwenvl_jax.evaluation.task import Decoding, Prediction, Reading, Sample, Style, Task
from qwenvl_jax.evaluation.tasks import registry
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.vlm import VLM


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
                model = LocalModel(vlm, asked.chats, asked.decoding)
                counts = runner.predict(asked.samples, model, part, pictures)
            part.finish([sample.id for sample in asked.samples])
            if counts.failed:
                tell(f"{name}: {counts.failed} of {counts.total} samples could not be asked, see {path}")
            found = score(read_predictions(path)[1], metrics.metric(asked.task.metric))
            path.with_suffix(".scores.json").write_text(to_json(found) + "\n", encoding="utf-8")
            scores |= {f"{name}/{number.name}": number.value for number in found.numbers}
        return scores
