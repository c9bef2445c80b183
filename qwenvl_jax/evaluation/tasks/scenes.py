"""Scenes that this project draws, about which the tiny model is asked: no files, the same questions every time.

The questions are those of `qwenvl_jax.evaluation.scenes.question_set`. A box in a question stands in Qwen-VL's
notation, thousandths of the picture.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from qwenvl_jax.data.questions import as_parts
from qwenvl_jax.evaluation.scenes import Item, question_set
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Reading, Sample, Task
from qwenvl_jax.evaluation.tasks.files import no_examples
from qwenvl_jax.processing.boxes import render

SCENES = 1000


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read(data: Path, reading: Reading) -> Iterator[Sample]:
    """The same in both styles: these questions have one wording each, that of chat. Pictures are drawn as they come."""
    no_examples("scenes", reading)
    drawn: tuple[object, bytes] = (None, b"")
    for item in question_set(SCENES):
        if drawn[0] is not item.scene:
            drawn = (item.scene, png(item.scene.draw()))
        yield as_sample(item, drawn[1])


def as_sample(item: Item, picture: bytes) -> Sample:
    question, size = item.question, (item.scene.width, item.scene.height)
    text = "".join(
        part["text"] if part["type"] == "text" else render(part["label"], part["box"], size)
        for part in as_parts(question.question)
    )
    return Sample(
        id=item.id,
        prompt=PICTURE + text,
        pictures=(picture,),
        reference={**dataclasses.asdict(question), "width": size[0], "height": size[1]},
        groups={
            "kind": question.kind,
            "language": question.language,
            "held_out": question.held_out or "seen",
        },
        question=text,
    )


TASKS = [Task("scenes", "scenes", (), read, "scenes", Decoding(max_new_tokens=64), chats=True)]
