"""Questions answered in a few words: VQAv2, OK-VQA, TextVQA, VizWiz, DocVQA, InfographicsVQA, ChartQA and others.

Which files hold a split, in the original's form or the official release's, is in `vqa_sources.py`.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qwenvl_jax.evaluation.task import Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks import prompts
from qwenvl_jax.evaluation.tasks.files import Source, choose
from qwenvl_jax.evaluation.tasks.vqa_sources import SOURCES, TRAINING, Question


@dataclasses.dataclass(frozen=True)
class Dataset:
    """metric: "" where the answers are kept by a server. tokens: as the original allows to a reply."""

    metric: str
    tokens: int = 10
    closing: str = prompts.SHORT_ANSWER


DATASETS = {
    "vqav2_val": Dataset("vqa_accuracy"),
    "vqav2_testdev": Dataset(""),
    "okvqa_val": Dataset("vqa_accuracy"),
    "textvqa_val": Dataset("vqa_accuracy"),
    "vizwiz_val": Dataset("vqa_accuracy", closing=prompts.UNANSWERABLE + prompts.SHORT_ANSWER),
    "vizwiz_test": Dataset("", closing=prompts.UNANSWERABLE + prompts.SHORT_ANSWER),
    "docvqa_val": Dataset("anls", 100),
    "docvqa_test": Dataset("", 100),
    "infographicsvqa_val": Dataset("anls", 100),
    "infographicsvqa_test": Dataset("", 100),
    "chartqa_test_human": Dataset("relaxed_accuracy", 100),
    "chartqa_test_augmented": Dataset("relaxed_accuracy", 100),
    "gqa_testdev": Dataset("gqa"),
    "ocrvqa_val": Dataset("exact_match", 100),
    "ocrvqa_test": Dataset("exact_match", 100),
    "ai2diagram_test": Dataset("exact_match"),
}
CHARTQA = ("chartqa_test_human", "chartqa_test_augmented")


def training_records(name: str, data: Path, sources: tuple[Source, ...]) -> list[Question]:
    return list(choose(name, data, sources, " for worked examples")(data))


def render(question: Question) -> tuple[str, Path]:
    """A worked example. Of several answers the most frequent, or the first; the original wrote out the list."""
    answers = question.answers or ("",)
    return f"{prompts.vqa(Reading(), question.question)} {max(answers, key=answers.count)}", question.image


def read(data: Path, reading: Reading, name: str, closing: str) -> Iterator[Sample]:
    source = choose(name, data, SOURCES[name])
    before = prompts.worked_examples(reading, lambda: training_records(name, data, TRAINING[name]), render)
    for item, (examples, pictures) in zip(source(data), before, strict=False):
        answers = {} if item.answers is None else {"answers": list(item.answers)}
        yield Sample(
            id=str(item.id),
            prompt=examples + prompts.vqa(reading, item.question, closing),
            pictures=(*pictures, item.image),
            reference={"question_id": item.id, **answers},
            groups=item.groups,
            question=item.question,
        )


def read_chartqa(data: Path, reading: Reading) -> Iterator[Sample]:
    """Both halves, one after the other; their ids do not meet."""
    for name in CHARTQA:
        half = name.rpartition("_")[2]
        for sample in read(data, reading, name, prompts.SHORT_ANSWER):
            yield dataclasses.replace(sample, id=f"{half}-{sample.id}")


def _decoding(tokens: int) -> tuple[Decoding, Decoding]:
    return Decoding(max_new_tokens=tokens, min_new_tokens=1), Decoding(max_new_tokens=100)


TASKS = [
    Task(
        name,
        "vqa",
        SOURCES[name][0].files,
        partial(read, name=name, closing=dataset.closing),
        dataset.metric,
        *_decoding(dataset.tokens),
    )
    for name, dataset in DATASETS.items()
]
TASKS.append(
    Task(
        "chartqa_test",
        "vqa",
        tuple(file for name in CHARTQA for file in SOURCES[name][0].files),
        read_chartqa,
        "relaxed_accuracy",
        *_decoding(100),
    )
)
