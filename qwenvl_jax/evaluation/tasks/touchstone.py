"""TouchStone: open questions in English or Chinese whose answers a judge compares with those of GPT-4.

Read is the official TSV: `index`, `image` (base64), `question`, `human_annotation`, `gpt4_ha_answer`, `category` and
`task_name`. What the judge needs stays in the reference under these names.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qwenvl_jax.evaluation.task import PICTURE, Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks import tsv
from qwenvl_jax.evaluation.tasks.files import Source, choose, no_examples

FOR_THE_JUDGE = ("question", "human_annotation", "gpt4_ha_answer", "category", "task_name")
SOURCES = {
    f"touchstone_{language}": tuple(
        Source((f"touchstone/{file}",), lambda data, files: tsv.read_tsv(files[0])) for file in names
    )
    for language, names in (
        ("en", ("touchstone_20230831.tsv",)),
        ("cn", ("touchstone_20230831_cn.tsv", "touchstone_cn.tsv")),
    )
}


def read(data: Path, reading: Reading, name: str) -> Iterator[Sample]:
    no_examples(name, reading)
    for row, pictures in choose(name, data, SOURCES[name])(data):
        question = row.text("question")
        break_line = "\n" if reading.style == "qwenvl" and pictures else ""
        yield Sample(
            id=row.name("index"),
            prompt=PICTURE * len(pictures) + break_line + question,
            pictures=pictures,
            reference={field: row.text(field) for field in FOR_THE_JUDGE},
            groups={"category": row.text("category"), "task_name": row.text("task_name")},
            question=question,
        )


TASKS = [
    Task(name, "touchstone", SOURCES[name][0].files, partial(read, name=name), "touchstone", Decoding(512), chats=True)
    for name in SOURCES
]
