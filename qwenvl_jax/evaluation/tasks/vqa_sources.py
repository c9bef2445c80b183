"""Where the questions of `vqa.py` lie, and their readers: the original's jsonl first, then the official releases.

A jsonl line has `image`, `question`, `question_id` and mostly `answer`. VQA accuracy needs what all ten people said,
which stands in the annotation file only, so those splits have two files in the original's form as well.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.tasks.files import Pictures, Row, Source, as_row, json_file, json_lines

Id = int | str


@dataclasses.dataclass(frozen=True)
class Question:
    """answers: all that count, None where they are hidden."""

    id: Id
    question: str
    image: Path
    answers: tuple[str, ...] | None
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _id(row: Row, field: str) -> Id:
    row.name(field)
    return row.value(field)


def lines(data: Path, files: Sequence[Path], answers: bool = True, half: str = "") -> Iterator[Question]:
    """The original's jsonl. answers: whether they must be there. half: of ChartQA."""
    groups = {"split": half} if half else {}
    find = Pictures(data, files[0].parent)
    for row in json_lines(files[0]):
        known = tuple(row.texts("answer")) if answers else None
        yield Question(_id(row, "question_id"), row.text("question"), find(row.text("image")), known, groups)


def judged_lines(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """The original's jsonl with the annotation file that has all ten answers of each question."""
    annotations = _annotations(files[1])
    for question in lines(data, files[:1], answers=False):
        yield _judged(question, annotations, files[1])


def _annotations(path: Path) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """Of a VQA annotation file: answers and groups by question id."""
    found = {}
    for row in as_row(str(path), json_file(path)).rows("annotations"):
        answers = _people(row)
        groups = {name: row.text(name) for name in ("question_type", "answer_type") if row.fields.get(name)}
        found[row.name("question_id")] = (answers, groups)
    return found


def _people(row: Row) -> tuple[str, ...]:
    """What each person answered: a list of objects with `answer`. There are millions, so the fast way comes first."""
    try:
        found = tuple(answer["answer"] for answer in row.fields["answers"])
        if all(type(answer) is str for answer in found):
            return found
    except (KeyError, TypeError):
        pass
    return tuple(answer.text("answer") for answer in row.rows("answers"))


def _judged(question: Question, annotations: Mapping, path: Path) -> Question:
    if str(question.id) not in annotations:
        raise UserError(f"{path}: there is no annotation with the question_id {question.id!r}")
    answers, groups = annotations[str(question.id)]
    return dataclasses.replace(question, answers=answers, groups=groups)


def vqa_official(data: Path, files: Sequence[Path], folder: str) -> Iterator[Question]:
    """VQAv2 and OK-VQA: a file of questions and, but for hidden splits, one of annotations; folder: "val2014"."""
    annotations = _annotations(files[1]) if len(files) > 1 else {}
    for row in as_row(str(files[0]), json_file(files[0])).rows("questions"):
        image = data / "coco" / folder / f"COCO_{folder}_{row.integer('image_id'):012d}.jpg"
        question = Question(_id(row, "question_id"), row.text("question"), image, None)
        yield _judged(question, annotations, files[1]) if len(files) > 1 else question


def textvqa_official(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    for row in as_row(str(files[0]), json_file(files[0])).rows("data"):
        image = files[0].parent / "train_images" / f"{row.text('image_id')}.jpg"
        yield Question(_id(row, "question_id"), row.text("question"), image, tuple(row.texts("answers")))


def vizwiz_official(data: Path, files: Sequence[Path], folder: str, answers: bool = True) -> Iterator[Question]:
    """A list with `image`, `question` and `answers`; a question's id is its picture."""
    for row in as_row(str(files[0]), {"list": json_file(files[0])}).rows("list"):
        image = data / "vizwiz" / folder / row.text("image")
        known = _people(row) if answers else None
        groups = {"answer_type": row.text("answer_type")} if row.fields.get("answer_type") else {}
        yield Question(row.text("image"), row.text("question"), image, known, groups)


def document_official(
    data: Path, files: Sequence[Path], image: str, folders: Sequence[str], answers: bool = True
) -> Iterator[Question]:
    """DocVQA and InfographicsVQA: `image` is the field that names the picture, `folders` are where it may lie.

    Types are lists there; a question of several types has their names joined.
    """
    find = Pictures(*(files[0].parent / folder for folder in folders))
    for row in as_row(str(files[0]), json_file(files[0])).rows("data"):
        groups = {
            name: ", ".join(sorted(row.texts(field)))
            for name, field in DOCUMENT_GROUPS.items()
            if row.fields.get(field)
        }
        known = tuple(row.texts("answers")) if answers else None
        yield Question(_id(row, "questionId"), row.text("question"), find(row.text(image)), known, groups)


DOCUMENT_GROUPS = {
    "question_type": "question_types",
    "answer_type": "answer_type",
    "evidence": "evidence",
    "operation": "operation/reasoning",
}


def chartqa_official(data: Path, files: Sequence[Path], half: str) -> Iterator[Question]:
    """A list with `imgname`, `query` and `label`; questions have no ids, so they are counted."""
    for number, row in enumerate(as_row(str(files[0]), {"list": json_file(files[0])}).rows("list")):
        image = files[0].parent / "png" / row.text("imgname")
        yield Question(number, row.text("query"), image, tuple(row.texts("label")), {"split": half})


def gqa_official(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """An object of questions by id."""
    for number, fields in as_row(str(files[0]), json_file(files[0])).fields.items():
        row = as_row(f"{files[0]}: {number}", fields)
        types = row.fields.get("types") or {}
        groups = {name: str(types[name]) for name in ("structural", "semantic") if types.get(name)}
        image = data / "gqa" / "images" / f"{row.name('imageId')}.jpg"
        yield Question(number, row.text("question"), image, (row.text("answer"),), groups)


def ocrvqa_official(data: Path, files: Sequence[Path], split: int) -> Iterator[Question]:
    """An object of books, each with several questions; split is 1 for training, 2 for validation, 3 for test."""
    for book, fields in as_row(str(files[0]), json_file(files[0])).fields.items():
        row = as_row(f"{files[0]}: {book}", fields)
        if row.integer("split") != split:
            continue
        ending = Path(row.text("imageURL", ".jpg")).suffix or ".jpg"
        asked, answers = row.texts("questions"), row.texts("answers")
        if len(asked) != len(answers):
            raise row.error("answers", f"holds {len(answers)} texts for {len(asked)} questions")
        for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
            yield Question(f"{book}_{number}", question, data / "ocrvqa" / "images" / f"{book}{ending}", (answer,))


hidden = partial(lines, answers=False)
VQAV2, OKVQA = "vqav2/v2_{}mscoco_{}.json", "okvqa/{}mscoco_{}.json"
CHART = "chartqa/ChartQA Dataset"


def _vqa_files(form: str, split: str) -> tuple[str, str]:
    return form.format("OpenEnded_", f"{split}_questions"), form.format("", f"{split}_annotations")


def _lines_or(path: str, *others: Source) -> tuple[Source, ...]:
    return (Source((path,), lines), *others)


def _chart(half: str, split: str) -> tuple[Source, ...]:
    return (
        Source((f"chartqa/{split}_{half}.jsonl",), partial(lines, half=half)),
        *(
            Source((f"{root}/{split}/{split}_{half}.json",), partial(chartqa_official, half=half))
            for root in (CHART, "chartqa")
        ),
    )


_docvqa = partial(document_official, image="image", folders=(".", "val", "test", "train"))
_infographics = partial(document_official, image="image_local_name", folders=("infographicsvqa_images", "images", "."))
_INFOGRAPHICS = "infographicsvqa/infographicsVQA_{}_v1.0{}.json"

SOURCES: dict[str, tuple[Source, ...]] = {
    "vqav2_val": (
        Source(("vqav2/vqav2_val.jsonl", _vqa_files(VQAV2, "val2014")[1]), judged_lines),
        Source(_vqa_files(VQAV2, "val2014"), partial(vqa_official, folder="val2014")),
    ),
    "vqav2_testdev": (
        Source(("vqav2/vqav2_testdev.jsonl",), hidden),
        Source((VQAV2.format("OpenEnded_", "test-dev2015_questions"),), partial(vqa_official, folder="test2015")),
    ),
    "okvqa_val": (
        Source(("okvqa/okvqa_val.jsonl", _vqa_files(OKVQA, "val2014")[1]), judged_lines),
        Source(_vqa_files(OKVQA, "val2014"), partial(vqa_official, folder="val2014")),
    ),
    "textvqa_val": (
        Source(("textvqa/textvqa_val.jsonl", "textvqa/textvqa_val_annotations.json"), judged_lines),
        Source(("textvqa/TextVQA_0.5.1_val.json",), textvqa_official),
    ),
    "vizwiz_val": (
        Source(("vizwiz/vizwiz_val.jsonl", "vizwiz/vizwiz_val_annotations.json"), judged_lines),
        Source(("vizwiz/Annotations/val.json",), partial(vizwiz_official, folder="val")),
        Source(("vizwiz/val.json",), partial(vizwiz_official, folder="val")),
    ),
    "vizwiz_test": (
        Source(("vizwiz/vizwiz_test.jsonl",), hidden),
        Source(("vizwiz/Annotations/test.json",), partial(vizwiz_official, folder="test", answers=False)),
        Source(("vizwiz/test.json",), partial(vizwiz_official, folder="test", answers=False)),
    ),
    "docvqa_val": _lines_or(
        "docvqa/val.jsonl",
        Source(("docvqa/val/val_v1.0.json",), _docvqa),
        Source(("docvqa/val_v1.0_withQT.json",), _docvqa),
    ),
    "docvqa_test": (
        Source(("docvqa/test.jsonl",), hidden),
        Source(("docvqa/test/test_v1.0.json",), partial(_docvqa, answers=False)),
        Source(("docvqa/test_v1.0.json",), partial(_docvqa, answers=False)),
    ),
    "infographicsvqa_val": (
        Source((_INFOGRAPHICS.format("val", "_withQT"),), _infographics),
        Source(("infographicsvqa/val.jsonl",), lines),
    ),
    "infographicsvqa_test": (
        Source((_INFOGRAPHICS.format("test", ""),), partial(_infographics, answers=False)),
        Source(("infographicsvqa/test.jsonl",), hidden),
    ),
    "chartqa_test_human": _chart("human", "test"),
    "chartqa_test_augmented": _chart("augmented", "test"),
    "gqa_testdev": _lines_or(
        "gqa/testdev_balanced.jsonl", Source(("gqa/testdev_balanced_questions.json",), gqa_official)
    ),
    "ocrvqa_val": _lines_or(
        "ocrvqa/ocrvqa_val.jsonl", Source(("ocrvqa/dataset.json",), partial(ocrvqa_official, split=2))
    ),
    "ocrvqa_test": _lines_or(
        "ocrvqa/ocrvqa_test.jsonl", Source(("ocrvqa/dataset.json",), partial(ocrvqa_official, split=3))
    ),
    "ai2diagram_test": _lines_or("ai2diagram/test.jsonl"),
}

_VQAV2_TRAIN = _lines_or(
    "vqav2/vqav2_train.jsonl",
    Source(_vqa_files(VQAV2, "train2014"), partial(vqa_official, folder="train2014")),
)
_VIZWIZ_TRAIN = _lines_or(
    "vizwiz/vizwiz_train.jsonl", Source(("vizwiz/Annotations/train.json",), partial(vizwiz_official, folder="train"))
)
_DOCVQA_TRAIN = _lines_or("docvqa/train.jsonl", Source(("docvqa/train_v1.0_withQT.json",), _docvqa))
_INFOGRAPHICS_TRAIN = (
    Source((_INFOGRAPHICS.format("train", ""),), _infographics),
    Source(("infographicsvqa/train.jsonl",), lines),
)
_OCRVQA_TRAIN = _lines_or(
    "ocrvqa/ocrvqa_train.jsonl", Source(("ocrvqa/dataset.json",), partial(ocrvqa_official, split=1))
)

TRAINING: dict[str, tuple[Source, ...]] = {
    "vqav2_val": _VQAV2_TRAIN,
    "vqav2_testdev": _VQAV2_TRAIN,
    "okvqa_val": _lines_or(
        "okvqa/okvqa_train.jsonl",
        Source(_vqa_files(OKVQA, "train2014"), partial(vqa_official, folder="train2014")),
    ),
    "textvqa_val": _lines_or(
        "textvqa/textvqa_train.jsonl", Source(("textvqa/TextVQA_0.5.1_train.json",), textvqa_official)
    ),
    "vizwiz_val": _VIZWIZ_TRAIN,
    "vizwiz_test": _VIZWIZ_TRAIN,
    "docvqa_val": _DOCVQA_TRAIN,
    "docvqa_test": _DOCVQA_TRAIN,
    "infographicsvqa_val": _INFOGRAPHICS_TRAIN,
    "infographicsvqa_test": _INFOGRAPHICS_TRAIN,
    "chartqa_test_human": _chart("human", "train"),
    "chartqa_test_augmented": _chart("augmented", "train"),
    # The original asks for train.jsonl, a file that was never offered; train_balanced.jsonl is the one that was.
    "gqa_testdev": (
        Source(("gqa/train_balanced.jsonl",), lines),
        Source(("gqa/train.jsonl",), lines),
        Source(("gqa/train_balanced_questions.json",), gqa_official),
    ),
    "ocrvqa_val": _OCRVQA_TRAIN,
    "ocrvqa_test": _OCRVQA_TRAIN,
    "ai2diagram_test": _lines_or("ai2diagram/train.jsonl"),
}
