"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg in the original's jsonl.

A line has `image`, `sent`, `bbox` (x1, y1, x2, y2 in pixels), `width` and `height`. It has no id; lines are counted.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qwenvl_jax.evaluation.task import Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks.files import Pictures, Source, choose, json_lines, no_examples
from qwenvl_jax.evaluation.tasks.prompts import CHAT_GROUNDING, GROUNDING

SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
SOURCES = {
    f"{name}_{split}": Source((f"{name}/{name}_{split}.jsonl",), lambda data, files: json_lines(files[0]))
    for name, splits in SPLITS.items()
    for split in splits
}


def read(data: Path, reading: Reading, name: str) -> Iterator[Sample]:
    no_examples(name, reading)
    source = choose(name, data, [SOURCES[name]])
    form = GROUNDING if reading.style == "qwenvl" else CHAT_GROUNDING
    find = Pictures(data, (data / source.files[0]).parent)
    for number, row in enumerate(source(data)):
        phrase = row.text("sent")
        yield Sample(
            id=str(number),
            prompt=form.format(phrase),
            pictures=(find(row.text("image")),),
            reference={
                "box": row.numbers("bbox", 4),
                "width": row.integer("width"),
                "height": row.integer("height"),
            },
            groups={"split": name.rpartition("_")[2]},
            question=phrase,
        )


TASKS = [
    Task(
        name,
        "grounding",
        source.files,
        partial(read, name=name),
        "grounding",
        Decoding(max_new_tokens=28, min_new_tokens=10),
        Decoding(max_new_tokens=64),
    )
    for name, source in SOURCES.items()
]
