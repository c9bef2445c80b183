"""Scenes, what can be asked about them, and files: what every miniature is made of.

Scene i of a split is the same in every benchmark, so that a miniature is a function of the seed and the number of
samples alone.
"""

import base64
import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.data.questions import View, ask, caption
from qwenvl_jax.data.scenes import COLORS, SHAPES, Scene, sample_scene, scene_rng

KINDS = ("color", "count", "shape", "exist", "read", "relation")  # of short answers, taken in turn
PEOPLE = 10  # who answer a question of VQA
WRONG = {
    "color": COLORS,
    "shape": SHAPES,
    "count": tuple("0123456"),
    "exist": ("yes", "no"),
    "relation": ("left", "right", "above", "below", "larger", "smaller"),
    "read": ("HOUSE", "RIVER", "17", "42"),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question in English with its short answer."""

    kind: str
    question: str
    answer: str


class Studio:
    """Draws into a folder. samples: of each benchmark."""

    def __init__(self, folder: Path, samples: int, seed: int = 0):
        self.folder = folder
        self.samples = samples
        self.seed = seed

    def scenes(self, split: str = "test", count: int | None = None) -> list[Scene]:
        return [self.scene(split, index) for index in range(self.samples if count is None else count)]

    @functools.cache  # noqa: B019
    def scene(self, split: str, index: int) -> Scene:
        return sample_scene(self.seed, split, index)

    def rng(self, scene: Scene, stream: int):
        return scene_rng(self.seed, scene.split, scene.index, stream)

    def asked(self, scene: Scene, kinds: Sequence[str] = KINDS) -> Asked:
        """A question that the scene allows, of the kinds in turn from one scene to the next."""
        rng, view = self.rng(scene, 7), View(scene)
        for step in range(len(kinds)):
            kind = kinds[(scene.index + step) % len(kinds)]
            question = ask(view, kind, rng, "en")
            if question and isinstance(question.question, str) and isinstance(question.answer, str):
                return Asked(kind, question.question, question.answer)
        return Asked("count", "How many objects are there?", str(len(scene.objects)))

    def choices(self, scene: Scene, asked: Asked, count: int = 4) -> tuple[list[str], int]:
        """The answer among wrong ones, and its number."""
        rng = self.rng(scene, 8)
        wrong = [word for word in WRONG[asked.kind] if word != asked.answer]
        picked = [wrong[i] for i in rng.permutation(len(wrong))[: count - 1]]
        number = int(rng.integers(len(picked) + 1))
        return [*picked[:number], asked.answer, *picked[number:]], number

    def phrase(self, scene: Scene) -> tuple[str, list[float]]:
        """What stands for one object alone, and its box in pixels."""
        question = ask(View(scene), "ground", self.rng(scene, 9), "en")
        if question is None or isinstance(question.answer, str):
            thing = scene.objects[0]
            return f"{thing.color} {thing.shape}", [round(value, 1) for value in thing.box]
        return question.answer[0]["label"], question.answer[0]["box"]

    def captions(self, scene: Scene) -> list[str]:
        """What five people might say."""
        text = caption(scene, "en")
        things = [f"{thing.color} {thing.shape}" for thing in scene.objects]
        return [
            text,
            f"A picture of {', '.join(things)}.",
            f"{len(things)} shapes on a plain background.",
            f"There is a {things[0]}.",
            text.lower(),
        ]

    def yes_no(self, scene: Scene) -> list[tuple[str, bool]]:
        """Two questions whether something is there: one to be answered with yes, one with no."""
        there = {(thing.color, thing.shape) for thing in scene.objects}
        absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in there]
        here, gone = sorted(there)[0], absent[int(self.rng(scene, 10).integers(len(absent)))]
        return [(f"Is there a {' '.join(pair)} in this image?", yes) for pair, yes in ((here, True), (gone, False))]

    def picture(self, scene: Scene, path: str) -> str:
        """Draws the scene into the folder; the path as the original's files have it."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            scene.draw().save(target, quality=95)
        return f"data/{path}"

    def encoded(self, scene: Scene) -> str:
        """The picture as a table holds it."""
        return base64.b64encode(self.bytes(scene)).decode()

    @functools.cache  # noqa: B019
    def bytes(self, scene: Scene, form: str = "JPEG") -> bytes:
        file = io.BytesIO()
        scene.draw().save(file, form)
        return file.getvalue()

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def json(self, name: str, value: Any) -> None:
        self.path(name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.path(name).write_text(text, encoding="utf-8")

    def table(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """A TSV; the columns are those of the first row."""
        import csv

        with self.path(name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def people(answer: str) -> list[str]:
    """What ten people answered: most the same, one a near miss, one nothing."""
    return [answer] * (PEOPLE - 2) + [f"{answer}s", "unanswerable"]
