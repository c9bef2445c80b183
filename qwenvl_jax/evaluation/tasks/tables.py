"""Benchmarks that VLMEvalKit spread as TSV: OCRBench, MathVista, HallusionBench and POPE.

HallusionBench and POPE are read from their official JSON as well.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from qwenvl_jax.evaluation.task import PICTURE, Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks import tsv
from qwenvl_jax.evaluation.tasks.files import Pictures, Row, Source, as_row, choose, json_file, json_lines, no_examples
from qwenvl_jax.evaluation.tasks.prompts import vqa, yes_or_no

Found = tuple[Row, Sequence[Path | bytes]]


def _table(data: Path, files: Sequence[Path]) -> Iterator[Found]:
    return tsv.read_tsv(files[0])


def ocrbench(reading: Reading, row: Row, pictures: Sequence[Path | bytes]) -> Sample:
    """`question`, `answer` (a list), `category`."""
    answers = [str(answer) for answer in tsv.python_list(row, "answer")]
    return Sample(
        id=row.name("index"),
        prompt=vqa(reading, row.text("question"), ""),  # the questions say themselves what to write
        pictures=tuple(pictures),
        reference={"answers": answers, "type": row.text("category")},
        groups={"type": row.text("category")},
        question=row.text("question"),
    )


def mathvista(reading: Reading, row: Row, pictures: Sequence[Path | bytes]) -> Sample:
    """`question` holds the official query: the hint on the form of the answer, the question and the choices."""
    choices = [str(choice) for choice in tsv.python_list(row, "choices")] if "choices" in row.fields else []
    precision = row.fields.get("precision")
    question = row.text("question")
    return Sample(
        id=row.name("index"),
        prompt=f"{PICTURE}{question}" + ("\nAnswer:" if reading.style == "qwenvl" else ""),
        pictures=tuple(pictures),
        reference={
            "question_type": row.text("question_type"),
            "answer_type": row.text("answer_type"),
            "precision": int(float(precision)) if precision else None,
            "answer": row.text("answer"),
            "choices": choices,
        },
        groups={name: _label(row, name) for name in ("task", "context", "skills") if name in row.fields},
        question=question,
    )


def _label(row: Row, field: str) -> str:
    text = row.text(field)
    return ", ".join(sorted(map(str, tsv.python_list(row, field)))) if text.startswith("[") else text


def hallusionbench(reading: Reading, row: Row, pictures: Sequence[Path | bytes]) -> Sample:
    """The table's `index` ends in the numbers of set, figure and question."""
    parts = row.name("index").split("_")
    if len(parts) < 3:
        raise row.error("index", f"holds {row.name('index')!r}, which does not end in SET_FIGURE_QUESTION")
    category, subcategory = row.text("category"), row.text("l2-category")
    question = row.text("question")
    prompt = yes_or_no(reading, question)
    return Sample(
        id=row.name("index"),
        prompt=PICTURE * len(pictures) + prompt.removeprefix(PICTURE),  # some questions have no picture
        pictures=tuple(pictures),
        reference={
            "answer": _yes_no(row),
            "category": category,
            "subcategory": subcategory,
            **dict(zip(("set_id", "figure_id", "question_id"), parts[-3:], strict=True)),
        },
        groups={"category": category, "subcategory": subcategory},
        question=question,
    )


def hallusionbench_official(data: Path, files: Sequence[Path]) -> Iterator[Found]:
    """HallusionBench.json in the names of the table: a list with `gt_answer` "0" or "1" and, mostly, `filename`."""
    find = Pictures(files[0].parent / "hallusion_bench", files[0].parent)
    for row in as_row(str(files[0]), {"list": json_file(files[0])}).rows("list"):
        names = ("category", "subcategory", "set_id", "figure_id", "question_id")
        parts = [row.name(name) for name in names]
        answer = row.name("gt_answer")
        if answer not in ("0", "1"):
            raise row.error("gt_answer", f"holds {answer!r}, not 0 or 1")
        fields = {
            "index": "_".join([*parts[:2], row.name("visual_input"), *parts[2:]]),
            "category": parts[0],
            "l2-category": parts[1],
            "question": row.text("question"),
            "answer": ("No", "Yes")[int(answer)],
        }
        name = row.text("filename", "")
        yield Row(row.where, fields), [find(name)] if name else []


def pope(reading: Reading, row: Row, pictures: Sequence[Path | bytes]) -> Sample:
    """`question`, `answer`, `category` (random, popular, adversarial)."""
    return Sample(
        id=row.name("index"),
        prompt=vqa(reading, row.text("question")),
        pictures=tuple(pictures),
        reference={"answer": _yes_no(row)},
        groups={"category": row.text("category")} if "category" in row.fields else {},
        question=row.text("question"),
    )


POPE_PARTS = ("random", "popular", "adversarial")


def pope_official(data: Path, files: Sequence[Path]) -> Iterator[Found]:
    """coco_pope_PART.json: lines with `question_id`, `image`, `text` and `label`."""
    find = Pictures(data / "coco" / "val2014", data, files[0].parent)
    for path, part in zip(files, POPE_PARTS, strict=True):
        for row in json_lines(path):
            fields = {
                "index": f"{part}-{row.name('question_id')}",
                "question": row.text("text"),
                "answer": row.text("label"),
                "category": part,
            }
            yield Row(row.where, fields), [find(row.text("image"))]


def _yes_no(row: Row) -> str:
    answer = row.text("answer").strip().lower()
    if answer not in ("yes", "no"):
        raise row.error("answer", f"holds {answer!r}, not yes or no")
    return answer


SHORT = Decoding(max_new_tokens=10), Decoding(max_new_tokens=64)
DATASETS = {
    "ocrbench": (ocrbench, (Source(("ocrbench/OCRBench.tsv",), _table),), (Decoding(100), Decoding(100))),
    "mathvista_testmini": (
        mathvista,
        (Source(("mathvista/MathVista_MINI.tsv",), _table),),
        (Decoding(20), Decoding(512)),
    ),
    "hallusionbench": (
        hallusionbench,
        (
            Source(("hallusionbench/HallusionBench.tsv",), _table),
            Source(("hallusionbench/HallusionBench.json",), hallusionbench_official),
        ),
        SHORT,
    ),
    "pope": (
        pope,
        (
            Source(tuple(f"pope/coco/coco_pope_{part}.json" for part in POPE_PARTS), pope_official),
            Source(tuple(f"pope/coco_pope_{part}.json" for part in POPE_PARTS), pope_official),
            Source(("pope/POPE.tsv",), _table),
        ),
        SHORT,
    ),
}


def read(data: Path, reading: Reading, name: str) -> Iterator[Sample]:
    no_examples(name, reading)
    as_sample, sources, _ = DATASETS[name]
    for row, pictures in choose(name, data, sources)(data):
        yield as_sample(reading, row, pictures)


def _family(name: str) -> str:
    return "yes_no" if name in ("hallusionbench", "pope") else "vqa"


METRICS = {"mathvista_testmini": "mathvista"}
TASKS = [
    Task(name, _family(name), sources[0].files, partial(read, name=name), METRICS.get(name, name), *decoding)
    for name, (_, sources, decoding) in DATASETS.items()
]
