"""Questions with lettered options: ScienceQA, AI2D, MMBench, MMStar and RealWorldQA; SEED-Bench is in `seed_bench.py`.

In style "qwenvl" the letter is the likeliest continuation of the prompt, as in the original; in style "chat", or where
the reading says so, it is generated.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_jax.evaluation.task import Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks import tsv
from qwenvl_jax.evaluation.tasks.files import Pictures, Row, Source, as_row, choose, json_file, json_lines, no_examples
from qwenvl_jax.evaluation.tasks.prompts import LETTERS, continuations, multiple_choice, vqa

DECODING = Decoding(max_new_tokens=10), Decoding(max_new_tokens=100)


@dataclasses.dataclass(frozen=True)
class Question:
    """answer: the number of the right choice, None where it is hidden. reference: what a metric needs besides."""

    id: str
    question: str
    choices: Sequence[str]
    answer: int | None
    pictures: Sequence[Path | bytes]
    hint: str = ""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def checked(row: Row, question: Question) -> Question:
    """The question. Raises UserError where its choices or its answer make no sense."""
    if not 2 <= len(question.choices) <= len(LETTERS):
        raise row.error("choices", f"holds {len(question.choices)} options; a question has 2 to {len(LETTERS)}")
    if question.answer is not None and not 0 <= question.answer < len(question.choices):
        raise row.error("answer", f"is {question.answer}, the options are 0 to {len(question.choices) - 1}")
    return question


def as_sample(reading: Reading, item: Question, context: bool = True) -> Sample:
    """context: see `prompts.multiple_choice`."""
    answer = {} if item.answer is None else {"answer": item.answer}
    return Sample(
        id=item.id,
        prompt=multiple_choice(reading, item.question, item.choices, item.hint, len(item.pictures), context),
        pictures=tuple(item.pictures),
        reference={**answer, "choices": list(item.choices), **item.reference},
        choices=continuations(reading, len(item.choices)),
        groups=item.groups,
        question=item.question,
    )


def scienceqa_lines(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """The original's jsonl: `image`, `question`, `hint`, `choices`, `answer` (a number). Lines are counted."""
    find = Pictures(data, files[0].parent)
    for number, row in enumerate(json_lines(files[0])):
        yield _from_line(find, row, str(number), row.integer("answer"))


def _from_line(find: Pictures, row: Row, id: str, answer: int | None) -> Question:
    image = find(row.text("image"))
    found = Question(id, row.text("question"), row.texts("choices"), answer, [image], row.text("hint", ""))
    return checked(row, found)


SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def scienceqa_problems(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """The official problems.json: the problems of the test split that have a picture."""
    for number, fields in as_row(str(files[0]), json_file(files[0])).fields.items():
        row = as_row(f"{files[0]}: {number}", fields)
        if row.text("split") != "test" or not row.fields.get("image"):
            continue
        image = data / "scienceqa" / "images" / "test" / number / row.text("image")
        subject = row.text("subject", "")
        groups = {"subject": SUBJECTS.get(subject, subject), "grade": row.text("grade", "")}
        found = Question(
            number,
            row.text("question"),
            row.texts("choices"),
            row.integer("answer"),
            [image],
            row.text("hint", ""),
            {name: label for name, label in groups.items() if label},
        )
        yield checked(row, found)


def table(data: Path, files: Sequence[Path], groups: Sequence[str] = ()) -> Iterator[Question]:
    """A TSV with options in columns A, B, ... and a letter in `answer`. groups: columns, with - for _ if need be."""
    for row, pictures in tsv.read_tsv(files[0]):
        yield _from_table(row, pictures, groups)


def _from_table(row: Row, pictures: Sequence[bytes], groups: Sequence[str] = ()) -> Question:
    choices = tsv.options(row)
    return checked(
        row,
        Question(
            row.name("index"),
            row.text("question"),
            choices,
            tsv.answer_number(row, choices),
            pictures,
            row.text("hint", ""),
            _groups(row, groups),
        ),
    )


def _groups(row: Row, names: Sequence[str]) -> dict[str, str]:
    found = {name: row.fields.get(name) or row.fields.get(name.replace("_", "-")) for name in names}
    return {name: label for name, label in found.items() if label}


def mmbench_table(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """A question's rotations have its index plus multiples of a million."""
    for row, pictures in tsv.read_tsv(files[0]):
        question = _from_table(row, pictures, ("category", "l2_category"))
        yield dataclasses.replace(question, reference={"index": row.integer("index")})


def mmbench_lines(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """The original's jsonl: `index`, `image`, `hint`, `question`, `choices` and, but for hidden splits, `answer`."""
    find = Pictures(data, files[0].parent)
    for row in json_lines(files[0]):
        answer = row.integer("answer") if "answer" in row.fields else None
        index = row.integer("index")
        yield dataclasses.replace(_from_line(find, row, str(index), answer), reference={"index": index})


def _mmbench(name: str, file: str) -> tuple[Source, ...]:
    """The table is read before the original's jsonl: it has the categories."""
    tables = [f"mmbench/{name}/{name}.tsv", f"mmbench/{name}.tsv", f"mmbench/{file}.tsv"]
    return (
        *(Source((path,), mmbench_table) for path in tables),
        Source((f"mmbench/{name}/{name}.jsonl",), mmbench_lines),
    )


MMBENCH = {
    "mmbench_dev_20230712": "mmbench_dev_20230712",
    "mmbench_test_20230712": "mmbench_test_20230712",
    **{
        f"mmbench_{split}_{language}_20231003": f"MMBench_{split.upper()}_{language.upper()}"
        for split in ("dev", "test")
        for language in ("en", "cn")
    },
    **{
        f"mmbench_{split}_{language}_v11": f"MMBench_{split.upper()}_{language.upper()}_V11"
        for split in ("dev", "test")
        for language in ("en", "cn")
    },
}
SOURCES: dict[str, tuple[Source, ...]] = {
    "scienceqa_test_img": (
        Source(("scienceqa/scienceqa_test_img.jsonl",), scienceqa_lines),
        Source(("scienceqa/problems.json",), scienceqa_problems),
    ),
    "ai2d_test": (Source(("ai2d/AI2D_TEST.tsv",), table),),
    "mmstar": (Source(("mmstar/MMStar.tsv",), partial(table, groups=("category", "l2_category"))),),
    **{name: _mmbench(name, file) for name, file in MMBENCH.items()},
}


def read(data: Path, reading: Reading, name: str) -> Iterator[Sample]:
    no_examples(name, reading)
    questions: Iterable[Question] = choose(name, data, SOURCES[name])(data)
    for item in questions:
        yield as_sample(reading, item)


REALWORLDQA = Source(("realworldqa/RealWorldQA.tsv",), lambda data, files: tsv.read_tsv(files[0]))


def read_realworldqa(data: Path, reading: Reading) -> Iterator[Sample]:
    """Most questions have options; the others ask for a word or a number."""
    no_examples("realworldqa", reading)
    for row, pictures in choose("realworldqa", data, [REALWORLDQA])(data):
        if "A" in row.fields:
            sample = as_sample(reading, _from_table(row, pictures))
            yield dataclasses.replace(sample, reference={**sample.reference, "answer": row.text("answer").strip()})
        else:
            yield Sample(
                id=row.name("index"),
                prompt=vqa(reading, row.text("question")),
                pictures=pictures,
                reference={"answer": row.text("answer"), "choices": []},
                question=row.text("question"),
            )


METRICS = {"mmstar": "mmstar"} | {name: "" if "_test_" in name else "mmbench" for name in MMBENCH}
TASKS = [
    Task(
        name,
        "multiple_choice",
        SOURCES[name][0].files,
        partial(read, name=name),
        METRICS.get(name, "choice_accuracy"),
        *DECODING,
    )
    for name in SOURCES
]
TASKS.append(Task("realworldqa", "multiple_choice", REALWORLDQA.files, read_realworldqa, "realworldqa", *DECODING))
