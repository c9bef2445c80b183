"""Answers of the model as it is now to a few validation questions, kept with what was expected: seeing it learn.

The answers come from the decode path that users call, greedily, and change nothing in the run: they read its parameters
and no random number.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.data.questions import View, ask
from qwenvl_jax.data.records import Record
from qwenvl_jax.data.scenes import sample_scene, scene_rng
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.processing import boxes
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED
from qwenvl_jax.vlm import VLM, Reply

LONGEST_ANSWER = 256  # tokens
SIDE = 448  # pixels of the longer side of a kept picture
SCENE_KINDS = ("ground", "caption", "count", "color", "relation", "read", "shape", "inside", "exist", "size")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question to the model: the conversation up to it, its text, the answer that is right, and where it is from."""

    messages: list[dict[str, Any]]
    question: str
    expected: str
    where: str


def record_questions(records: Iterable[Record], processor: Processor, count: int) -> list[Asked]:
    """The last questions of the first `count` records that can be read, their pictures loaded."""
    return list(itertools.islice(_readable(records, processor), count))


def scene_records(seed: int) -> Iterator[Record]:
    """A question about each scene of the validation split, another kind every time, as records."""
    for index in itertools.count():
        scene, rng = sample_scene(seed, "val", index), scene_rng(seed, "val", index, stream=1)
        question = ask(View(scene), SCENE_KINDS[index % len(SCENE_KINDS)], rng)
        if question is not None:
            yield Record(question.messages(scene.draw()), f"val scene {index}")


def _readable(records: Iterable[Record], processor: Processor) -> Iterator[Asked]:
    for record in records:
        try:
            tokens, labels, _ = processor.training_tokens(record.messages, answers_only=True)
            messages = [_with_pictures(message, processor) for message in record.messages[:-1]]
        except UserError:
            continue  # a bad validation record is left out of the loss, too
        learnt = np.flatnonzero(labels != IGNORED)
        if len(learnt) and len(tokens) < processor.config.max_position_embeddings:
            last = learnt[np.flatnonzero(np.diff(learnt, prepend=-2) > 1)[-1] :]  # where the last answer stands
            expected = processor.decode(np.array(tokens.ids)[last]).strip()
            yield Asked(messages, _text(messages[-1]["content"]), expected, record.where)


def _with_pictures(message: dict[str, Any], processor: Processor) -> dict[str, Any]:
    """The message with its pictures loaded, once for all the times that it is asked."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] in ("image", "image_url"):
            source = part["image"] if part["type"] == "image" else part["image_url"]["url"]
            part = {"type": "image", "image": processor.load(source)}
        parts.append(part)
    return message | {"content": parts}


def _text(content: str | list[dict[str, Any]]) -> str:
    """What a person reads of a message's content; its pictures are shown beside it."""
    if isinstance(content, str):
        return content
    words = []
    for part in content:
        kind = part["type"]
        if kind in ("text", "ref"):
            words.append(part[kind])
        elif kind in ("box", "quad"):
            corners = ", ".join(f"{number:.0f}" for number in part[kind])
            words.append(f"{part.get('label') or ''} [{kind} {corners}]".strip())
    return "".join(words).strip()


class Samples:
    """Asks the questions of a run and keeps the answers under `folder`/STEP: pictures and samples.jsonl."""

    def __init__(self, asked: Sequence[Asked], processor: Processor, folder: Path):
        self.asked, self.processor, self.folder = list(asked), processor, folder
        self.vlm: VLM | None = None

    @contextlib.contextmanager
    def loaded(self, model: QwenVL) -> Iterator[VLM]:
        """The model as users have it, to be asked; lets go of its weights at the end."""
        if self.vlm is None:
            self.vlm = VLM(model, self.processor)
        else:
            self.vlm.generator.load(model)
        try:
            yield self.vlm
        finally:
            self.vlm.generator.unload()

    def answer(self, model: QwenVL, step: int) -> None:
        """Has the model answer; the programs that do are compiled the first time."""
        if not self.asked:
            return
        with self.loaded(model) as vlm:
            replies = vlm.batch([asked.messages for asked in self.asked], max_new_tokens=LONGEST_ANSWER)
        folder = self.folder / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [self._keep(folder, *pair) for pair in enumerate(zip(self.asked, replies, strict=True))]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "samples.jsonl").write_text(text, encoding="utf-8")

    def _keep(self, folder: Path, number: int, answered: tuple[Asked, Reply]) -> dict[str, Any]:
        """Saves the latest picture with the boxes of both answers, and returns the line about them."""
        asked, reply = answered
        line = {"where": asked.where, "question": asked.question, "expected": asked.expected, "answer": reply.text}
        if not reply.pictures:
            return line
        expected = self.processor.boxes(asked.expected, reply.pictures)
        name = f"{number}.png"
        shown = boxes.draw_answers(reply.pictures[-1], {"expected": expected, "answered": reply.boxes}, SIDE)
        shown.save(folder / name)
        return line | {"picture": name, "boxes": {"expected": len(expected), "answered": len(reply.boxes)}}
