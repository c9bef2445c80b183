"""SEED-Bench: questions about pictures (types 1 to 9) and about videos (10 to 12), the latter shown as sampled frames.

Read is the official SEED-Bench.json, with pictures in `SEED-Bench-image` and frames in `video_imgs_4` (made by
`qwenvl_jax.evaluation.convert seed_bench`), or the original's jsonl, whose lines hold the prompt itself.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from qwenvl_jax.evaluation.task import PICTURE, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks.files import Pictures, Row, Source, as_row, choose, json_file, json_lines, no_examples
from qwenvl_jax.evaluation.tasks.multiple_choice import DECODING, Question, as_sample, checked

FRAMES = 4
TYPES = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attribute",
    4: "Instance Location",
    5: "Instance Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Recognition",
    10: "Action Recognition",
    11: "Action Prediction",
    12: "Procedure Understanding",
}
PARTS = {"image": range(1, 10), "video": range(10, 13)}
_PICTURE_PATH = re.compile(r"<img>(.*?)</img>")
_LINE = re.compile(r"\A(?:<img>.*?</img>\n)+Question: (.*)\nOptions: A\. (.*)\nAnswer:\Z", re.DOTALL)
_OPTION = re.compile(r"\n[B-D]\. ")


def frame_name(question_id: str, number: int) -> str:
    return f"{question_id}_{number}.jpg"


def official(data: Path, files: Sequence[Path], part: str) -> Iterator[Question]:
    """`questions` with `question_id`, `question_type_id`, `data_id`, `question`, `choice_a` to `choice_d`, `answer`."""
    folder = files[0].parent
    for row in as_row(str(files[0]), json_file(files[0])).rows("questions"):
        kind = row.integer("question_type_id")
        if kind not in PARTS[part]:
            continue
        id = row.name("question_id")
        if part == "image":
            pictures = [folder / "SEED-Bench-image" / row.text("data_id")]
        else:
            names = [folder / f"video_imgs_{FRAMES}" / frame_name(id, number) for number in range(FRAMES)]
            pictures = [path for path in names if path.exists()] or names  # a short clip has fewer
        choices = [row.text(f"choice_{letter}") for letter in "abcd"]
        groups = {"type": TYPES[kind]}
        question = Question(id, row.text("question"), choices, _letter(row), pictures, "", groups, {"type": kind})
        yield checked(row, question)


def _letter(row: Row) -> int:
    answer = row.text("answer")
    if answer not in ("A", "B", "C", "D"):
        raise row.error("answer", f"holds {answer!r}, not one of A, B, C, D")
    return "ABCD".index(answer)


def lines(data: Path, files: Sequence[Path], part: str) -> Iterator[Question]:
    """The original's jsonl: `question_id`, `prompt`, `answer`. Types are not in it, so that only the part is known;
    a question without frames ("Error..." for a prompt) is left out."""
    find = Pictures(data, files[0].parent)
    for row in json_lines(files[0]):
        prompt = row.text("prompt")
        if prompt.startswith("Error"):
            continue
        match = _LINE.match(prompt)
        if not match:
            raise row.error("prompt", "is not of the form <img>...</img>, Question, Options, Answer")
        pictures = [find(path) for path in _PICTURE_PATH.findall(prompt)]
        choices = _OPTION.split(match[2])
        kind = min(PARTS[part])
        question = Question(
            row.name("question_id"), match[1], choices, _letter(row), pictures, reference={"type": kind}
        )
        yield checked(row, question)


ROOT = "seed_bench"
SOURCES = {
    "image": (
        Source((f"{ROOT}/SEED-Bench.json",), partial(official, part="image")),
        Source((f"{ROOT}/image_input.jsonl",), partial(lines, part="image")),
    ),
    "video": (
        Source((f"{ROOT}/SEED-Bench.json", f"{ROOT}/video_imgs_{FRAMES}"), partial(official, part="video")),
        Source((f"{ROOT}/video_input_{FRAMES}.jsonl",), partial(lines, part="video")),
    ),
}


def read(data: Path, reading: Reading, parts: Sequence[str], name: str) -> Iterator[Sample]:
    no_examples(name, reading)
    for part, source in [(part, choose(name, data, SOURCES[part])) for part in parts]:
        for item in source(data):
            sample = as_sample(reading, item, context=False)
            if part == "video" and reading.style == "chat":
                frames = PICTURE * len(item.pictures)
                note = f"These {len(item.pictures)} pictures are frames of one video, in order.\n"
                sample = dataclasses.replace(sample, prompt=frames + note + sample.prompt.removeprefix(frames))
            yield sample


TASKS = [
    Task(
        name,
        "multiple_choice",
        tuple(file for part in parts for file in SOURCES[part][0].files),
        partial(read, parts=parts, name=name),
        "seed_bench",
        *DECODING,
    )
    for name, parts in (
        ("seed_bench", ("image", "video")),
        ("seed_bench_image", ("image",)),
        ("seed_bench_video", ("video",)),
    )
]
