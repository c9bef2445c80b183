"""Converts official releases into the files that the original's scripts read, and predictions into submissions.

    python -m qwenvl_jax.evaluation.convert mmbench mmbench_dev_20230712.tsv data/mmbench/mmbench_dev_20230712
    python -m qwenvl_jax.evaluation.convert seed_bench SEED-BENCH data/seed_bench [--frames 4]
    python -m qwenvl_jax.evaluation.convert mme MME_Benchmark_release_version data/mme
    python -m qwenvl_jax.evaluation.convert vqav2_val data data/vqav2/vqav2_val.jsonl     # or any VQA dataset
    python -m qwenvl_jax.evaluation.convert submit-docvqa predictions.jsonl docvqa.json   # see submissions.py

Evaluation itself reads the official files of all but SEED-Bench's videos directly; the rest is for the original's
scripts and for servers.
"""

import argparse
import difflib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import submissions
from qwenvl_jax.evaluation.frames import pyav, sample_frames
from qwenvl_jax.evaluation.tasks import mme as mme_task
from qwenvl_jax.evaluation.tasks import tsv, vqa_sources
from qwenvl_jax.evaluation.tasks.files import Row, as_row, choose, json_file
from qwenvl_jax.evaluation.tasks.prompts import options_text
from qwenvl_jax.evaluation.tasks.seed_bench import FRAMES, PARTS, frame_name

VIDEO_FOLDERS = {
    10: "SSV2/videos",
    11: "EPIC-KITCHENS/3h91syskeag572hl6tvuovwv4d/videos/test",
    12: "BreakfastII_15fps_qvga_sync",
}


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes JSON lines; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def original_path(path: Path) -> str:
    """As the original's files name a picture: from the folder `data` on, where there is one above it."""
    parts = path.resolve().parts
    if "data" in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("data") :])
    return str(path.resolve())


def mmbench(source: Path, target: Path) -> str:
    """A TSV of MMBench as pictures and a jsonl named after it."""
    images = target / "images"
    images.mkdir(parents=True, exist_ok=True)

    def lines() -> Iterable[dict[str, Any]]:
        for row, pictures in tsv.read_tsv(source):
            index, choices = row.integer("index"), tsv.options(row)
            if len(pictures) != 1:
                raise row.error("image", f"holds {len(pictures)} pictures, not one")
            path = images / f"{index}.jpg"
            _opened(row, pictures[0]).save(path)
            answer = tsv.answer_number(row, choices)
            yield {
                "index": index,
                "image": original_path(path),
                "hint": row.text("hint", "N/A"),
                "question": row.text("question"),
                "choices": choices,
                **({} if answer is None else {"answer": answer}),
            }

    count = write_lines(target / f"{source.stem}.jsonl", lines())
    return f"{count} questions in {target / source.stem}.jsonl"


def _opened(row: Row, content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError) as error:
        raise row.error("image", f"is no picture ({error})") from None


def seed_bench(source: Path, target: Path, frames: int = FRAMES) -> str:
    """SEED-Bench.json with its pictures and videos as the original's two jsonl files and a folder of frames.

    A video that cannot be read becomes, as in the original, a line whose prompt begins with "Error".
    """
    rows = list(as_row(str(source / "SEED-Bench.json"), json_file(source / "SEED-Bench.json")).rows("questions"))
    images = [row for row in rows if row.integer("question_type_id") in PARTS["image"]]
    videos = [row for row in rows if row.integer("question_type_id") in PARTS["video"]]
    if videos:
        pyav()
    shown = (_seed_line(row, [source / "SEED-Bench-image" / row.text("data_id")]) for row in images)
    write_lines(target / "image_input.jsonl", shown)
    folder = target / f"video_imgs_{frames}"
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []

    def video_lines() -> Iterable[dict[str, Any]]:
        for row in videos:
            try:
                paths = _save_frames(source, folder, row, frames)
            except UserError as error:
                failed.append(str(error))
                yield {**_seed_line(row, []), "prompt": f"Error: {error}"}
            else:
                yield _seed_line(row, paths)

    write_lines(target / f"video_input_{frames}.jsonl", video_lines())
    if videos and len(failed) == len(videos):
        raise UserError(f"no video could be read; the first: {failed[0]}")
    note = f"; {len(failed)} videos cannot be read, the first: {failed[0]}" if failed else ""
    return f"{len(images)} questions about pictures and {len(videos)} about videos in {target}{note}"


def _save_frames(source: Path, folder: Path, row: Row, count: int) -> list[Path]:
    kind, name = row.integer("question_type_id"), row.text("data_id")
    path = source / VIDEO_FOLDERS[kind] / (name.rpartition("/")[2] if kind == 11 else name)
    segment = row.fields.get("segment")
    if segment is not None:
        row.numbers("segment", 2)  # frames or seconds: whether they are whole numbers matters
    found = sample_frames(path, segment, count)
    paths = [folder / frame_name(row.name("question_id"), number) for number in range(len(found))]
    for frame, path in zip(found, paths, strict=True):
        frame.save(path)
    return paths


def _seed_line(row: Row, pictures: list[Path]) -> dict[str, Any]:
    shown = "".join(f"<img>{original_path(path)}</img>\n" for path in pictures)
    options = options_text([row.text(f"choice_{letter}") for letter in "abcd"])
    prompt = f"{shown}Question: {row.text('question')}\nOptions: {options}\nAnswer:"
    return {"question_id": row.name("question_id"), "prompt": prompt, "answer": row.text("answer")}


def mme(source: Path, target: Path) -> str:
    """The official release as `images/TASK/` and `Your_Results/TASK.txt`."""
    missing = [task for task in mme_task.TASK_NAMES if not (source / task).is_dir()]
    if missing:
        raise UserError(f"{source / missing[0]}: no such folder; name the one of MME's release that holds its 14 tasks")
    texts: dict[str, str] = {}
    for task, image, question, answer in mme_task.release(source, [source / task for task in mme_task.TASK_NAMES]):
        copy = target / "images" / task / image.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(image, copy)
        except OSError as error:
            raise UserError(f"{image}: cannot be copied ({error.strerror})") from None
        texts[task] = texts.get(task, "") + f"{image.name}\t{question}\t{answer.capitalize()}\n"
    (target / "Your_Results").mkdir(parents=True, exist_ok=True)
    for task, text in texts.items():
        (target / "Your_Results" / f"{task}.txt").write_text(text, encoding="utf-8")
    return f"{len(texts)} tasks in {target}"


def vqa(name: str, source: Path, target: Path) -> str:
    """The official files of a VQA dataset, in the data folder, as the original's jsonl.

    Of the answers of ten people the most frequent is written; those that all count stay a list.
    """
    official = [found for found in vqa_sources.SOURCES[name] if not any(".jsonl" in file for file in found.files)]
    if not official:
        raise UserError(f"{name} has no official files that could be converted; get the original's jsonl")
    people = any("annotations" in file or "vizwiz" in file or "TextVQA" in file for file in official[0].files)

    def lines() -> Iterable[dict[str, Any]]:
        for item in choose(name, source, official)(source):
            answers = list(item.answers or ())
            known: Any = max(answers, key=answers.count) if answers and (people or len(answers) == 1) else answers
            image = "data/" + Path(os.path.relpath(item.image, source)).as_posix()
            yield {
                "image": image,
                "question": item.question,
                "question_id": item.id,
                **({"answer": known} if answers else {}),
            }

    return f"{write_lines(target, lines())} questions in {target}"


CONVERTERS: dict[str, Callable[[Path, Path], str]] = {"mmbench": mmbench, "seed_bench": seed_bench, "mme": mme}


def convert(kind: str, source: Path, target: Path, frames: int = FRAMES) -> str:
    """Converts; what was done, in a line. Raises UserError, with the kind that was perhaps meant."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder to convert")
    if kind.startswith("submit-"):
        return submissions.write(kind.removeprefix("submit-"), source, target)
    if kind in vqa_sources.SOURCES:
        return vqa(kind, source, target)
    if kind == "seed_bench":
        return seed_bench(source, target, frames)
    if kind in CONVERTERS:
        return CONVERTERS[kind](source, target)
    kinds = [*CONVERTERS, *vqa_sources.SOURCES, *(f"submit-{form}" for form in submissions.FORMS)]
    near = difflib.get_close_matches(kind, kinds, 1)
    raise UserError(
        f"{kind!r} is nothing to convert; " + (f"did you mean {near[0]}?" if near else f"there are {kinds}")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert benchmarks and predictions.")
    parser.add_argument("kind", help="mmbench, seed_bench, mme, a VQA dataset, or submit-FORM")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of each video of SEED-Bench")
    options = parser.parse_args()
    try:
        print(convert(options.kind, options.source, options.target, options.frames))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
