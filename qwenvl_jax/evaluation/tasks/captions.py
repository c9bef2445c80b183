"""Captions: Flickr30K, NoCaps and COCO.

Read are the original's converted files and NoCaps' own (COCO style: `images` and `annotations`), Karpathy's releases
(`dataset_flickr30k.json`, `dataset_coco.json`) and the COCO files of BLIP (a list with `image` and `caption`).
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks.files import Pictures, Source, as_row, choose, json_file, no_examples
from qwenvl_jax.evaluation.tasks.prompts import CAPTION, CHAT_CAPTION, worked_examples

_LAST_NUMBER = re.compile(r"(\d+)\.\w+$")


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A picture with the captions that people gave it, and the number that a submission calls it by."""

    number: int | str
    image: Path
    captions: tuple[str, ...]
    domain: str = ""


def coco_style(data: Path, files: Sequence[Path], folder: str = "") -> Iterator[Captioned]:
    """`images` with `id` and `image` (the original) or `file_name` (NoCaps, whose pictures lie in `folder`)."""
    file = files[0]
    content = as_row(str(file), json_file(file))
    captions: dict[Any, list[str]] = {}
    find = Pictures(data, file.parent)
    for row in content.rows("annotations"):
        captions.setdefault(row.value("image_id"), []).append(row.text("caption"))
    for row in content.rows("images"):
        number = row.value("id")
        if number not in captions:
            raise UserError(f"{row.where}: no caption in 'annotations' has the image_id {number!r}")
        name = row.text("image") if "image" in row.fields else f"{folder}{row.text('file_name')}"
        yield Captioned(number, find(name), tuple(captions[number]), row.text("domain", ""))


def karpathy(data: Path, files: Sequence[Path], split: str, folder: str) -> Iterator[Captioned]:
    """Karpathy's releases: all splits in one file; COCO's pictures lie in `filepath`, Flickr's in `folder`."""
    find = Pictures(data, files[0].parent)
    for row in as_row(str(files[0]), json_file(files[0])).rows("images"):
        if row.text("split") == split or (split == "train" and row.text("split") == "restval"):
            captions = tuple(sentence.text("raw").strip() for sentence in row.rows("sentences"))
            name = f"{row.text('filepath', folder)}/{row.text('filename')}"
            number = row.value("cocoid") if "cocoid" in row.fields else row.value("imgid")
            yield Captioned(number, find(name), captions)


def blip(data: Path, files: Sequence[Path]) -> Iterator[Captioned]:
    """A list with `image` ("val2014/COCO_val2014_000000391895.jpg") and `caption`, one or a list of them."""
    find = Pictures(data / "coco", data, files[0].parent)
    for row in as_row(str(files[0]), {"list": json_file(files[0])}).rows("list"):
        name = row.text("image")
        number = _LAST_NUMBER.search(name)
        yield Captioned(int(number[1]) if number else name, find(name), tuple(row.texts("caption")))


FLICKR_FOLDER = "flickr30k-images"
SOURCES = {
    "flickr": (
        Source(("flickr30k/flickr30k_karpathy_test.json",), coco_style),
        Source(("flickr/flickr30k_karpathy_test.json",), coco_style),
        Source(("flickr30k/dataset_flickr30k.json",), partial(karpathy, split="test", folder=FLICKR_FOLDER)),
    ),
    "nocaps": (
        Source(("nocaps/nocaps_val.json",), coco_style),
        Source(("nocaps/nocaps_val_4500_captions.json",), partial(coco_style, folder="images/")),
    ),
    "coco": (
        Source(("coco/coco_karpathy_test.json",), blip),
        Source(("coco/annotations/coco_karpathy_test.json",), blip),
        Source(("coco/dataset_coco.json",), partial(karpathy, split="test", folder="")),
    ),
}
TRAINING = {
    "flickr": (
        Source(("flickr30k/flickr30k_karpathy_train.json",), coco_style),
        Source(("flickr/flickr30k_karpathy_train.json",), coco_style),
        Source(("flickr30k/dataset_flickr30k.json",), partial(karpathy, split="train", folder=FLICKR_FOLDER)),
    ),
    "coco": (
        Source(("coco/coco_karpathy_train.json",), blip),
        Source(("coco/annotations/coco_karpathy_train.json",), blip),
        Source(("coco/dataset_coco.json",), partial(karpathy, split="train", folder="")),
    ),
}


def _training(name: str, data: Path) -> list[tuple[Path, str]]:
    """Every caption with its picture, a record each."""
    found: Iterable[Captioned] = choose(name, data, TRAINING[name], " for worked examples")(data)
    return [(item.image, caption) for item in found for caption in item.captions]


def _render(record: tuple[Path, str]) -> tuple[str, Path]:
    return f"{CAPTION} {record[1]}", record[0]


def read(data: Path, reading: Reading, name: str) -> Iterator[Sample]:
    source = choose(name, data, SOURCES[name])
    if name not in TRAINING:
        no_examples(name, reading)
    before = worked_examples(reading, lambda: _training(name, data), _render)
    prompt = CAPTION if reading.style == "qwenvl" else CHAT_CAPTION
    for item, (examples, pictures) in zip(source(data), before, strict=False):
        yield Sample(
            id=str(item.number),
            prompt=examples + prompt,
            pictures=(*pictures, item.image),
            reference={"references": list(item.captions), "image_id": item.number},
            groups={"domain": item.domain} if item.domain else {},
            question="Describe the picture.",
        )


TASKS = [
    Task(
        name,
        "caption",
        SOURCES[name][0].files,
        partial(read, name=name),
        "captions",
        Decoding(max_new_tokens=30, min_new_tokens=8),
        Decoding(max_new_tokens=60),
    )
    for name in SOURCES
]
