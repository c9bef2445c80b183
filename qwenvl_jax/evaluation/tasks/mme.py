"""MME: fourteen tasks with two questions about each picture, to be answered with yes or no.

Read are the files that the official evaluation starts from (`Your_Results/TASK.txt`, lines of picture, question and
answer with tabs between) with the original's `images/TASK/`, or the official release as it is.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks.files import Source, choose, no_examples, read_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASK_NAMES = PERCEPTION + COGNITION
ENDINGS = (".jpg", ".png", ".jpeg")
Question = tuple[str, Path, str, str]  # task, picture, question, answer


def results_files(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """`Your_Results/TASK.txt` and `images/TASK/PICTURE`."""
    for path in files[:-1]:
        for where, parts in _table(path, ("picture", "question", "answer")):
            yield path.stem, files[-1] / path.stem / parts[0], parts[1], _answer(where, parts[2])


def release(data: Path, files: Sequence[Path]) -> Iterator[Question]:
    """The official release: a text file of two lines (question and answer) beside each picture, or in folders apart."""
    for folder in files:
        pictures = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS}
        apart = folder / "questions_answers_YN"
        for path in sorted((apart if apart.is_dir() else folder).glob("*.txt")):
            image = pictures.get(path.stem, folder / f"{path.stem}.jpg")
            for where, (question, answer) in _table(path, ("question", "answer")):
                yield folder.name, image, question, _answer(where, answer)


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        parts = line.strip().split("\t")
        if not line.strip():
            continue
        if len(parts) != len(columns):
            raise UserError(f"{where}: holds {len(parts)} fields, not {', '.join(columns)} with tabs between")
        yield where, parts


def _answer(where: str, text: str) -> str:
    answer = text.strip().lower()
    if answer not in ("yes", "no"):
        raise UserError(f"{where}: field 'answer' holds {text!r}, not Yes or No")
    return answer


RELEASES = ("MME_Benchmark_release_version", "MME_Benchmark_release", "MME_Benchmark")
SOURCES = (
    Source((*(f"mme/Your_Results/{task}.txt" for task in TASK_NAMES), "mme/images"), results_files),
    *(Source(tuple(f"mme/{root}/{task}" for task in TASK_NAMES), release) for root in RELEASES),
)


def read(data: Path, reading: Reading) -> Iterator[Sample]:
    """Questions end in "Please answer yes or no." as they stand. The original puts a line break before them."""
    no_examples("mme", reading)
    counts: dict[tuple[str, str], int] = {}
    for task, image, question, answer in choose("mme", data, SOURCES)(data):
        key = (task, image.name)
        counts[key] = counts.get(key, 0) + 1
        yield Sample(
            id=f"{task}/{image.name}/{counts[key]}",
            prompt=f"{PICTURE}\n{question}" if reading.style == "qwenvl" else PICTURE + question,
            pictures=(image,),
            reference={"task": task, "image": image.name, "answer": answer},
            groups={"task": task},
            question=question,
        )


# The original samples with top_p 0.01, which is greedy but for ties.
TASKS = [
    Task(
        "mme", "mme", ("mme/Your_Results", "mme/images"), partial(read), "mme", Decoding(max_new_tokens=64), chats=True
    )
]
