"""How well a model answers about scenes: a fixed test set, its scores, and what guessing blindly would reach.

`evaluate` asks a model and keeps every reply; `report` scores replies, from the run or from a file of predictions, and
never needs the model. Scenes, questions and right answers come from `qwenvl_jax.data`.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import typing
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import rich.table
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.data.questions import KINDS, Question, View, ask
from qwenvl_jax.data.scene_text import CHINESE
from qwenvl_jax.data.scenes import COLORS, SHAPES, SIZES, Scene, sample_scene, scene_rng

CHINESE_SHARE = 0.25
IOU_THRESHOLD = 0.5
Corners = Sequence[float]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of the test set with the scene it is about."""

    id: str
    scene: Scene
    question: Question


def question_set(limit_scenes: int = 1000, seed: int = 0, split: str = "test") -> list[Item]:
    """For each of `limit_scenes` scenes one question of each kind that applies, in random words, a quarter Chinese.

    The same arguments give the same questions. Which answer is right is drawn before the question is, so that yes and
    no, left and right, the colours and so on are about equally frequent and a guess is worth little (`priors`).
    """
    items = []
    for index in range(limit_scenes):
        scene = sample_scene(seed, split, index)
        rng = scene_rng(seed, split, index, stream=1)
        view = View(scene)
        for kind in KINDS:
            language = "zh" if rng.random() < CHINESE_SHARE else "en"
            question = ask(view, kind, rng, language)
            if question is not None:
                items.append(Item(f"{split}-{seed}-{index}-{kind}", scene, question))
    return items


def normalise(text: str) -> str:
    """Lower case, one kind of width, single spaces, no punctuation at the end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(" .。!！,")


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_ENGLISH_OBJECT = re.compile(
    rf"\b(?:({_alternatives(SIZES)}) )?({_alternatives(COLORS)}) ({_alternatives(SHAPES)})\b", re.IGNORECASE
)
_TO_ENGLISH = {CHINESE[word]: word for word in (*SIZES, *COLORS, *SHAPES)}
_CHINESE_OBJECT = re.compile(
    "(?:({})的?)?({})的?({})".format(
        *(_alternatives([CHINESE[word] for word in words]) for words in (SIZES, COLORS, SHAPES))
    )
)


def parse_objects(text: str) -> list[tuple[str | None, str, str]]:
    """The objects that a text names, as (size or None, colour, shape) in English, in the order of the text."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    english = [(match[1], match[2], match[3]) for match in _ENGLISH_OBJECT.finditer(text)]
    if english:
        return english
    chinese = [(match[1], match[2], match[3]) for match in _CHINESE_OBJECT.finditer(text)]
    return [(_TO_ENGLISH.get(size), _TO_ENGLISH[color], _TO_ENGLISH[shape]) for size, color, shape in chinese]


def iou(first: Corners, second: Corners) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where either is empty."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(across, 0.0) * max(down, 0.0)
    areas = [max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0


def score(question: Question, reply: str, boxes: Sequence[Corners] = ()) -> dict[str, typing.Any]:
    """Whether a reply is right: {"right": bool} and, by kind, what else is worth knowing.

    Short answers must be equal after `normalise`. A grounding is right when its first box (in pixels of the picture as
    asked about) overlaps the true one by an IoU of at least 0.5; "iou" is given. What is inside a box: exactly one
    object is named, with its colour and shape. A caption: the objects named are exactly the objects shown, each by
    colour and shape; "sizes" and, where there is one, "text" tell whether all sizes and the written text are right.
    """
    expected = question.expected
    if question.kind == "ground":
        overlap = iou(boxes[0], expected["box"]) if boxes else 0.0
        return {"right": overlap >= IOU_THRESHOLD, "iou": overlap}
    if question.kind == "inside":
        pairs = [(color, shape) for _, color, shape in parse_objects(reply)]
        return {"right": pairs == [(expected["color"], expected["shape"])]}
    if question.kind == "caption":
        named, truth = parse_objects(reply), [tuple(thing) for thing in expected["objects"]]
        right = collections.Counter(thing[1:] for thing in named) == collections.Counter(thing[1:] for thing in truth)
        sizes = right and collections.Counter(named) == collections.Counter(truth)
        result = {"right": right, "sizes": sizes}
        if expected["text"] is not None:
            result["text"] = re.search(rf"(?<![A-Z0-9]){expected['text']}(?![A-Z0-9])", reply) is not None
        return result
    return {"right": normalise(reply) == normalise(expected["answer"])}


def grey_noise(image: Image.Image, seed: int = 0) -> Image.Image:
    """A picture of the same size that shows nothing: grey noise, PIL RGB."""
    rng = np.random.default_rng(seed)
    grey = np.clip(rng.normal(128, 40, (image.height, image.width)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def evaluate(
    vlm,
    limit: int = 1000,
    *,
    blind: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    split: str = "test",
    max_new_tokens: int = 64,
    predictions: str | pathlib.Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Ask a model all questions about `limit` scenes, greedily; one prediction for each (see `prediction`), in order.

    `vlm` answers `batch(conversations, max_new_tokens=...)` with replies that have `.text` and `.boxes`. `blind` shows
    it `grey_noise` in place of each picture. Predictions are also written to the file `predictions` as they come, one
    JSON object per line. `progress` is called with (questions answered, questions in all).
    """
    items = question_set(limit, seed, split)
    order = sorted(
        range(len(items)), key=lambda i: KINDS.index(items[i].question.kind)
    )  # answers of like length together
    records: dict[int, dict] = {}
    lines = open(predictions, "w", encoding="utf-8") if predictions else None  # noqa: SIM115
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            replies = vlm.batch([_ask(items[i], blind) for i in chosen], max_new_tokens=max_new_tokens)
            for i, reply in zip(chosen, replies, strict=True):
                records[i] = prediction(items[i], reply.text, [(b.x1, b.y1, b.x2, b.y2) for b in reply.boxes])
                if lines:
                    lines.write(json.dumps(records[i], ensure_ascii=False) + "\n")
            if lines:
                lines.flush()
            if progress:
                progress(len(records), len(items))
    finally:
        if lines:
            lines.close()
    return [records[i] for i in range(len(items))]


def _ask(item: Item, blind: bool) -> list[dict]:
    picture = item.scene.draw()
    return item.question.messages(grey_noise(picture) if blind else picture)[:1]


def prediction(item: Item, reply: str, boxes: Sequence[Corners] = ()) -> dict:
    """A line of a predictions file: the question and its right answer, the reply, and the reply's boxes in pixels."""
    return {
        "id": item.id,
        **dataclasses.asdict(item.question),
        "reply": reply,
        "boxes": [[float(value) for value in box] for box in boxes],
    }


def read_predictions(path: str | pathlib.Path) -> list[dict]:
    """The predictions in a file of `evaluate`. Raises UserError naming the line that is not one."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions; make one by evaluating a checkpoint")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            score(question_of(record), record["reply"], record["boxes"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}, line {number}: not a prediction ({type(error).__name__}: {error})") from error
        records.append(record)
    return records


def question_of(record: dict) -> Question:
    """The question of a prediction."""
    return Question(**{field.name: record[field.name] for field in dataclasses.fields(Question)})


def wilson(right: float, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion, `right` out of `of` (Wilson 1927); (0, 1) when nothing was asked."""
    if of == 0:
        return 0.0, 1.0
    share = right / of
    centre = share + z * z / (2 * of)
    spread = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low, high = ((centre + sign * spread) / (1 + z * z / of) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _accuracy(scores: Iterable[bool]) -> dict[str, float]:
    scores = list(scores)
    low, high = wilson(sum(scores), len(scores))
    return {
        "accuracy": sum(scores) / len(scores) if scores else 0.0,
        "low": low,
        "high": high,
        "right": sum(scores),
        "of": len(scores),
    }


GROUPS: dict[str, Callable[[dict], bool]] = {
    "all": lambda record: True,
    "seen": lambda record: record["held_out"] is None,
    "held-out pair": lambda record: "pair" in (record["held_out"] or ""),
    "held-out count": lambda record: "count" in (record["held_out"] or ""),
    "English": lambda record: record["language"] == "en",
    "Chinese": lambda record: record["language"] == "zh",
}


def report(predictions: Sequence[dict]) -> dict[str, typing.Any]:
    """Scores of predictions, as plain data.

    "kinds" maps each kind that is not hard to its groups (GROUPS), "hard" the same for the others; each group has
    "accuracy", Wilson's 95% interval "low" and "high", "right" and "of" (numbers of questions). "prior" is what a good
    guess without the picture gets for each kind (`priors`), "details" what `score` adds: mean IoU, sizes, text.
    """
    scores = [score(question_of(record), record["reply"], record["boxes"]) for record in predictions]
    tables: dict[str, dict] = {"kinds": {}, "hard": {}}
    details: dict[str, dict[str, float]] = {}
    for kind in [kind for kind in KINDS if any(record["kind"] == kind for record in predictions)]:
        chosen = [(record, found) for record, found in zip(predictions, scores, strict=True) if record["kind"] == kind]
        groups = {
            name: _accuracy(found["right"] for record, found in chosen if belongs(record))
            for name, belongs in GROUPS.items()
        }
        tables["hard" if chosen[0][0]["hard"] else "kinds"][kind] = groups
        for extra in sorted({name for _, found in chosen for name in found} - {"right"}):
            values = [found[extra] for _, found in chosen if extra in found]
            details.setdefault(kind, {})[extra] = sum(values) / len(values)
    return {
        "questions": len(predictions),
        **tables,
        "prior": priors([question_of(record) for record in predictions]),
        "details": details,
    }


def priors(questions: Sequence[Question]) -> dict[str, float]:
    """What the best fixed guess gets for each kind, knowing the language and which two answers a relation offers.

    The guess is the most frequent answer (for grounding the median box) of the very questions it is tried on, so it is
    an upper bound for a guess of its form.
    """
    groups: dict[tuple, list[Question]] = collections.defaultdict(list)
    for question in questions:
        groups[question.kind, question.language, _axis(question)].append(question)
    right: collections.Counter[str] = collections.Counter()
    for (kind, *_), members in groups.items():
        if kind == "ground":
            median = np.median([question.expected["box"] for question in members], axis=0).tolist()
            right[kind] += sum(score(question, "", [median])["right"] for question in members)
        else:
            right[kind] += collections.Counter(str(question.answer) for question in members).most_common(1)[0][1]
    asked = collections.Counter(question.kind for question in questions)
    return {kind: right[kind] / asked[kind] for kind in KINDS if asked[kind]}


def _axis(question: Question) -> str:
    """Which pair of answers an open relation offers; "" for other kinds."""
    if question.kind != "relation":
        return ""
    pairs = (("left", "right"), ("above", "below"), ("larger", "smaller"))
    for first, second in pairs:
        if question.answer in (first, second, CHINESE[first], CHINESE[second]):
            return first
    raise ValueError(f"{question.answer!r} answers no relation")


def table(scores: dict[str, typing.Any], title: str = "Scenes") -> rich.table.Table:
    """A `report` as a table: percent right by kind (with its 95% interval) and group, beside the prior."""
    result = rich.table.Table(title=title)
    result.add_column("kind")
    for column in ("questions", "right", "95%", *list(GROUPS)[1:], "prior"):
        result.add_column(column, justify="right")
    for hard, kinds in ((False, scores["kinds"]), (True, scores["hard"])):
        for kind, groups in kinds.items():
            whole = groups["all"]
            result.add_row(
                kind + (" (hard)" if hard else ""),
                str(whole["of"]),
                _percent(whole["accuracy"]),
                f"{_percent(whole['low'])}-{_percent(whole['high'])}",
                *(_percent(groups[name]["accuracy"]) if groups[name]["of"] else "-" for name in list(GROUPS)[1:]),
                _percent(scores["prior"][kind]),
            )
    details = (
        f"{kind} {name} {value:.3f}" for kind, values in scores["details"].items() for name, value in values.items()
    )
    result.caption = ", ".join(details)
    return result


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
