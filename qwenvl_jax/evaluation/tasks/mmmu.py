"""MMMU: college questions of thirty subjects, some with several pictures; the official parquet files per subject.

Columns: `id`, `question` and `options` (a Python list as text), both with marks `<image 1>`, `image_1` to `image_7`
({"bytes", "path"}), `answer`, `question_type`, `subfield`, `topic_difficulty`.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks.files import Row, Source, choose, no_examples
from qwenvl_jax.evaluation.tasks.prompts import LETTERS, SHORT_ANSWER, continuations, multiple_choice, vqa
from qwenvl_jax.evaluation.tasks.tsv import python_list

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
MOST_PICTURES = 7
SPLITS = {"dev": "dev", "val": "validation"}
_MARK = re.compile(r"<image (\d)>")


def rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file, a few at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError('MMMU is in parquet files: install pyarrow (pip install "qwenvl-jax[data]")') from None
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                for fields in batch.to_pylist():
                    yield Row(f"{path}, row {number}", fields)
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _sample(reading: Reading, row: Row, subject: str) -> Sample:
    stored = {number: row.fields.get(f"image_{number}") for number in range(1, MOST_PICTURES + 1)}
    images = {number: _bytes(row, number, value) for number, value in stored.items() if value}
    question, choices = row.text("question"), [str(option) for option in python_list(row, "options")]
    is_choice = row.text("question_type") == "multiple-choice"
    if is_choice and not 2 <= len(choices) <= len(LETTERS):
        raise row.error("options", f"holds {len(choices)} options; a question has 2 to {len(LETTERS)}")
    if is_choice:
        text = multiple_choice(reading, question, choices, pictures=0, context=False)
    else:
        text = vqa(reading, question, SHORT_ANSWER).removeprefix(PICTURE)
    prompt, pictures = (_in_place if reading.style == "qwenvl" else _in_front)(row, text, images)
    return Sample(
        id=row.text("id"),
        prompt=prompt,
        pictures=pictures,
        reference={
            "question_type": "multiple-choice" if is_choice else "open",
            "answer": _answer(row, choices if is_choice else None),
            "choices": choices if is_choice else [],
        },
        choices=continuations(reading, len(choices)) if is_choice else (),
        groups={"subject": subject, "discipline": SUBJECTS[subject]},
        question=question,
    )


def _bytes(row: Row, number: int, value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(content, bytes):
        raise row.error(f"image_{number}", "holds no bytes of a picture")
    return content


def _in_place(row: Row, text: str, images: dict[int, bytes]) -> tuple[str, tuple[bytes, ...]]:
    """Each picture where its mark stands (again, where a mark comes twice)."""
    marks = [int(number) for number in _MARK.findall(text)]
    unknown = next((number for number in marks if number not in images), None)
    if unknown is not None:
        raise row.error(f"image_{unknown}", f"is missing, and the question has a mark <image {unknown}>")
    return _MARK.sub(lambda match: PICTURE, text), tuple(images[number] for number in marks)


def _in_front(row: Row, text: str, images: dict[int, bytes]) -> tuple[str, tuple[bytes, ...]]:
    """All pictures first; the marks stay as names of them. So VLMEvalKit asks Qwen models."""
    return PICTURE * len(images) + text, tuple(images.values())


def _answer(row: Row, choices: list[str] | None) -> str | list[str]:
    """A letter; of open questions a text, or a list of those that are right, which is written as Python shows it."""
    answer = row.text("answer")
    if choices is not None:
        if answer not in LETTERS[: len(choices)]:
            raise row.error("answer", f"holds {answer!r}, and there are {len(choices)} options")
        return answer
    return [str(text) for text in python_list(row, "answer")] if answer.startswith("[") else answer


def _source(name: str) -> Source:
    """Any subject will do, so that one can be tried alone; docs/evaluation.md says that the score needs all thirty."""
    return Source((f"mmmu/*/{SPLITS[name]}-*.parquet",), lambda data, files: ())


def read(data: Path, reading: Reading, split: str) -> Iterator[Sample]:
    name = f"mmmu_{split}"
    no_examples(name, reading)
    choose(name, data, [_source(split)])
    for subject in sorted(SUBJECTS):
        files: Sequence[Path] = sorted((data / "mmmu" / subject).glob(f"{SPLITS[split]}-*.parquet"))
        for path in files:
            for row in rows(path):
                yield _sample(reading, row, subject)


TASKS = [
    Task(
        f"mmmu_{split}",
        "mmmu",
        _source(split).files,
        partial(read, split=split),
        "mmmu",
        Decoding(max_new_tokens=20),
        Decoding(max_new_tokens=512),
    )
    for split in SPLITS
]
