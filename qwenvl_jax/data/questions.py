"""Questions about one scene, with their answers: what may be asked, what is true, and in which words.

`ask` makes one question of a kind, `scene_questions` a varied handful for training. Conversations of several turns or
two pictures stand in `conversations.py`; scoring of replies in `evaluation/scenes.py`. Every question has exactly one
right answer: things are referred to by descriptions that fit one object alone, and comparisons are asked only where the
difference is plain to see.
"""

import collections
import dataclasses
import functools
import typing

import numpy as np

from qwenvl_jax.data.scene_text import (
    QUESTIONS,
    RELATION_QUESTIONS,
    RELATION_YESNO_QUESTIONS,
    RELATIONS,
    enumerate_phrases,
    name,
    translate,
    with_article,
)
from qwenvl_jax.data.scenes import COLORS, HELD_OUT_COUNT, HELD_OUT_PAIRS, SHAPES, Scene, SceneObject, allowed_pair

HARD_KINDS = ("relation_yesno",)
KIND_WEIGHTS = {
    "color": 1.0,
    "shape": 1.0,
    "size": 0.5,
    "count": 2.5,
    "relation": 1.5,
    "relation_yesno": 0.3,
    "exist": 1.0,
    "read": 1.5,
    "caption": 1.5,
    "ground": 2.5,
    "inside": 1.2,
}
ONCE_PER_PICTURE = ("read", "caption")  # asking twice would only repeat the answer
CLEAR_DISTANCE = 0.15  # of the picture's width or height, between two centres
COUNT_WEIGHTS = (0.35, 0.5, 1.0, 1.6, 2.2, 2.6, 2.6)  # by answer, so that no number is a good guess
BOX_JITTER = 0.05  # of a box's side: a box drawn by a user is not exact

Part = dict[str, typing.Any]
Content = str | list[Part]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its one right answer, as message content (text, or text and box parts; boxes in native pixels).

    `expected` is the answer in a form that can be scored: {"answer": str} for short answers, {"box": [x1, y1, x2, y2]},
    {"color", "shape"} for what is inside a box, {"objects": [[size, color, shape], ...], "text": str | None} for
    captions. `held_out` is None, "pair" (it is about a held-out pair of colour and shape), "count" (the picture has the
    held-out number of objects) or "pair+count"; `hard` marks kinds that are reported apart.
    """

    kind: str
    question: Content
    answer: Content
    language: str
    expected: dict[str, typing.Any]
    hard: bool = False
    held_out: str | None = None

    def messages(self, image) -> list[dict]:
        """The question about a picture (anything that an image part takes) and its answer, as two messages."""
        content = [{"type": "image", "image": image}, *as_parts(self.question)]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A description by some of size, colour and shape."""

    size: str | None
    color: str | None
    shape: str | None

    def name(self, language: str, plural: bool = False) -> str:
        return name(language, self.size, self.color, self.shape, plural)

    def fits(self, thing: SceneObject) -> bool:
        wanted = ((self.size, thing.size), (self.color, thing.color), (self.shape, thing.shape))
        return all(asked is None or asked == found for asked, found in wanted)


class View:
    """What the questions about one scene need to know, worked out once: which descriptions fit one object alone."""

    def __init__(self, scene: Scene):
        self.scene = scene
        described = [_descriptions(thing) for thing in scene.objects]
        uses = collections.Counter(reference for references in described for reference in references)
        self.references = [[r for r in references if uses[r] == 1] for references in described]

    def refer(self, rng, index: int, without: tuple[str, ...] = ()) -> Reference:
        """A description of one of the `referable(without)` objects; size is named only where it must be."""
        references = [r for r in self.references[index] if all(getattr(r, part) is None for part in without)]
        plain = [r for r in references if r.size is None]
        plain += [r for r in plain if r.color and r.shape]  # twice as often
        return pick(rng, plain or references)

    def referable(self, without: tuple[str, ...]) -> list[int]:
        """The objects with a description that fits no other and uses none of the properties named in `without`."""
        return [
            index
            for index, references in enumerate(self.references)
            if any(all(getattr(r, part) is None for part in without) for r in references)
        ]


def _descriptions(thing: SceneObject) -> list[Reference]:
    color, shape = thing.color, thing.shape
    return [
        Reference(size, *pair) for size in (None, thing.size) for pair in ((color, None), (None, shape), (color, shape))
    ]


def pick(rng: np.random.Generator, options: typing.Sequence):
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def as_parts(content: Content) -> list[Part]:
    """Message content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def held_out(scene: Scene, things: typing.Iterable[SceneObject]) -> str | None:
    """What makes a question about these objects of the scene one that training cannot have shown."""
    names = ["pair"] * any(thing.held_out for thing in things) + ["count"] * (len(scene.objects) == HELD_OUT_COUNT)
    return "+".join(names) or None


def _short(view: View, kind: str, question: Content, answer: str, language: str, things) -> Question:
    return Question(
        kind,
        question,
        answer,
        language,
        {"answer": answer},
        hard=kind in HARD_KINDS,
        held_out=held_out(view.scene, things),
    )


def _ask_property(view: View, rng, language: str, kind: str) -> Question | None:
    """Colour, shape or size of an object that is described without it."""
    candidates = view.referable((kind,))
    if not candidates:
        return None
    wanted = pick(rng, sorted({getattr(view.scene.objects[index], kind) for index in candidates}))
    index = pick(rng, [index for index in candidates if getattr(view.scene.objects[index], kind) == wanted])
    thing = view.scene.objects[index]
    reference = view.refer(rng, index, without=(kind,))
    question = pick(rng, QUESTIONS[kind][language]).format(ref=reference.name(language))
    return _short(view, kind, question, translate(getattr(thing, kind), language), language, [thing])


def choose_count(scene: Scene, rng: np.random.Generator) -> tuple[Reference, int]:
    """What to count, and how many there are: all objects, a colour, a shape or a pair; rare numbers are preferred."""
    things = scene.objects
    options = [Reference(None, None, None)] * 2
    options += [Reference(None, color, None) for color in COLORS]
    options += [Reference(None, None, shape) for shape in SHAPES]
    for thing, other in zip(things, (*things[1:], things[0]), strict=True):
        options += [Reference(None, thing.color, thing.shape)]
        if allowed_pair(thing.color, other.shape, scene.split):
            options += [Reference(None, thing.color, other.shape)]  # often a zero
    by_answer = collections.defaultdict(list)
    for option in options:
        by_answer[sum(map(option.fits, things))].append(option)
    answers = sorted(by_answer)
    edges = np.cumsum([COUNT_WEIGHTS[answer] for answer in answers])
    answer = answers[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
    return pick(rng, by_answer[answer]), answer


def _ask_count(view: View, rng, language: str) -> Question:
    reference, answer = choose_count(view.scene, rng)
    question = pick(rng, QUESTIONS["count"][language]).format(things=reference.name(language, plural=True))
    return _short(view, "count", question, str(answer), language, filter(reference.fits, view.scene.objects))


def choose_existence(scene: Scene, rng: np.random.Generator, present: bool) -> Reference:
    """A colour, a shape or a pair that is there or is not; many absent pairs mix a colour and a shape that are."""
    kind = rng.random()
    thing = pick(rng, scene.objects)
    if present:
        if kind < 0.6:
            return Reference(None, thing.color, thing.shape)
        return Reference(None, thing.color, None) if kind < 0.8 else Reference(None, None, thing.shape)
    colors, shapes = {o.color for o in scene.objects}, {o.shape for o in scene.objects}
    pairs = {(o.color, o.shape) for o in scene.objects}
    if kind >= 0.6 and len(shapes) < len(SHAPES):
        if kind < 0.8:
            return Reference(None, pick(rng, [color for color in COLORS if color not in colors]), None)
        return Reference(None, None, pick(rng, [shape for shape in SHAPES if shape not in shapes]))
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in pairs and allowed_pair(c, s, scene.split)]
    mixed = [(c, s) for c, s in absent if c in colors and s in shapes]
    partly = [(c, s) for c, s in absent if c in colors or s in shapes]
    options = mixed if mixed and rng.random() < 0.5 else partly if rng.random() < 0.7 else absent
    return Reference(None, *pick(rng, options))


def _ask_exist(view: View, rng, language: str) -> Question:
    present = rng.random() < 0.5
    reference = choose_existence(view.scene, rng, present)
    ref = reference.name(language)
    thing = with_article(ref) if language == "en" else ref
    question = pick(rng, QUESTIONS["exist"][language]).format(thing=thing, ref=ref)
    answer = ("yes" if present else "no") if language == "en" else ("有" if present else "没有")
    result = _short(view, "exist", question, answer, language, filter(reference.fits, view.scene.objects))
    if (reference.color, reference.shape) in HELD_OUT_PAIRS and not (result.held_out or "").startswith("pair"):
        result = dataclasses.replace(result, held_out="+".join(filter(None, ("pair", result.held_out))))
    return result


def relation_between(scene: Scene, axis: str, first: SceneObject, second: SceneObject) -> str | None:
    """How `first` stands to `second` on an axis of RELATIONS, or None where the difference is not plain."""
    if axis == "size":
        if first.size == second.size:
            return None
        return RELATIONS[axis][0 if first.side > second.side else 1]
    distance = (first.x - second.x) / scene.width if axis == "horizontal" else (first.y - second.y) / scene.height
    if abs(distance) < CLEAR_DISTANCE:
        return None
    return RELATIONS[axis][0 if distance < 0 else 1]


def _choose_relation(view: View, rng, language: str):
    """(axis, true relation, names of two objects, the objects) for a comparison that is plain, or None."""
    scene = view.scene
    for _ in range(6):
        axis = pick(rng, ("horizontal", "horizontal", "vertical", "vertical", "size"))
        without = ("size",) if axis == "size" else ()
        candidates = view.referable(without)
        if len(candidates) < 2:
            continue
        first, second = (int(i) for i in rng.permutation(candidates)[:2])
        things = scene.objects[first], scene.objects[second]
        relation = relation_between(scene, axis, *things)
        if relation is not None:
            names = [view.refer(rng, index, without).name(language) for index in (first, second)]
            return axis, relation, names, things
    return None


def _ask_relation(view: View, rng, language: str) -> Question | None:
    chosen = _choose_relation(view, rng, language)
    if chosen is None:
        return None
    axis, relation, (a, b), things = chosen
    x, y = (translate(RELATIONS[axis][int(i)], language) for i in rng.permutation(2))
    question = pick(rng, RELATION_QUESTIONS[axis][language]).format(a=a, b=b, x=x, y=y)
    return _short(view, "relation", question, translate(relation, language), language, things)


def _ask_relation_yesno(view: View, rng, language: str) -> Question | None:
    chosen = _choose_relation(view, rng, language)
    if chosen is None:
        return None
    axis, relation, (a, b), things = chosen
    asked = pick(rng, RELATIONS[axis])
    question = pick(rng, RELATION_YESNO_QUESTIONS[axis][language]).format(a=a, b=b, x=translate(asked, language))
    answer = translate("yes" if asked == relation else "no", language)
    return _short(view, "relation_yesno", question, answer, language, things)


def _ask_read(view: View, rng, language: str) -> Question | None:
    text = view.scene.text
    if text is None:
        return None
    kind = pick(rng, ("read", "read_number" if text.is_number else "read_word"))
    return _short(view, "read", pick(rng, QUESTIONS[kind][language]), text.text, language, ())


def caption(scene: Scene, language: str) -> str:
    """All objects from left to right, each with its size, then the written text."""
    phrases = []
    for thing in sorted(scene.objects, key=lambda thing: thing.x):
        phrase = name(language, thing.size, thing.color, thing.shape)
        phrases.append(with_article(phrase) if language == "en" else "一个" + phrase)
    if scene.text is not None:
        word, number = ("the word ", "the number ") if language == "en" else ("单词", "数字")
        phrases.append((number if scene.text.is_number else word) + scene.text.text)
    return enumerate_phrases(phrases, language)


def _ask_caption(view: View, rng, language: str) -> Question:
    scene = view.scene
    things = sorted(scene.objects, key=lambda thing: thing.x)
    expected = {
        "objects": [[thing.size, thing.color, thing.shape] for thing in things],
        "text": scene.text and scene.text.text,
    }
    question = pick(rng, QUESTIONS["caption"][language])
    return Question(
        "caption", question, caption(scene, language), language, expected, held_out=held_out(scene, scene.objects)
    )


def clipped_box(scene: Scene, box: typing.Sequence[float]) -> list[float]:
    """The box cut to the picture, in tenths of a pixel."""
    limits = (scene.width, scene.height) * 2
    return [round(min(max(value, 0.0), limit), 1) for value, limit in zip(box, limits, strict=True)]


def _ask_ground(view: View, rng, language: str) -> Question | None:
    candidates = view.referable(())
    if not candidates:
        return None
    index = pick(rng, candidates)
    thing = view.scene.objects[index]
    label = view.refer(rng, index).name(language)
    box = clipped_box(view.scene, thing.box)
    question = pick(rng, QUESTIONS["ground"][language]).format(ref=label)
    answer = [{"type": "box", "box": box, "label": label}]
    return Question("ground", question, answer, language, {"box": box}, held_out=held_out(view.scene, [thing]))


def _ask_inside(view: View, rng, language: str) -> Question:
    thing = pick(rng, view.scene.objects)
    x1, y1, x2, y2 = thing.box
    shifts = BOX_JITTER * (2 * rng.random(4) - 1) * (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
    box = clipped_box(view.scene, (np.array(thing.box) + shifts).tolist())
    before, after = pick(rng, QUESTIONS["inside"][language]).split("{box}")
    question = [{"type": "text", "text": before}] if before else []
    question += [{"type": "box", "box": box, "label": None}, {"type": "text", "text": after}]
    answer = name(language, None, thing.color, thing.shape)
    answer = with_article(answer) if language == "en" else answer
    expected = {"color": thing.color, "shape": thing.shape}
    return Question("inside", question, answer, language, expected, held_out=held_out(view.scene, [thing]))


ASKERS: dict[str, typing.Callable[..., Question | None]] = {
    **{kind: functools.partial(_ask_property, kind=kind) for kind in ("color", "shape", "size")},
    "count": _ask_count,
    "relation": _ask_relation,
    "relation_yesno": _ask_relation_yesno,
    "exist": _ask_exist,
    "read": _ask_read,
    "caption": _ask_caption,
    "ground": _ask_ground,
    "inside": _ask_inside,
}
KINDS = tuple(ASKERS)


def ask(view: View, kind: str, rng: np.random.Generator, language: str = "en") -> Question | None:
    """One question of `kind` (of KINDS) in `language` ("en" or "zh"), or None where the scene has none to ask."""
    return ASKERS[kind](view, rng, language)


def scene_questions(
    scene: Scene,
    rng: np.random.Generator,
    n: int = 9,
    weights: dict[str, float] | None = None,
    chinese_share: float = 0.25,
) -> list[Question]:
    """Up to `n` different questions about a scene, kinds drawn by `weights` (KIND_WEIGHTS; missing kinds: never).

    Fewer than `n` come back only where the scene has no more to ask. Raises KeyError for an unknown kind.
    """
    weights = KIND_WEIGHTS if weights is None else weights
    kinds = [kind for kind, weight in weights.items() if weight > 0]
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise KeyError(f"unknown kinds of question {sorted(unknown)}; there are {', '.join(KINDS)}")
    edges = np.cumsum([weights[kind] for kind in kinds])
    view = View(scene)
    questions, seen = [], set()
    for draw, language in rng.random((6 * n, 2)).tolist():
        kind = kinds[int(np.searchsorted(edges, draw * edges[-1], side="right"))]
        if kind in seen:
            continue
        question = ask(view, kind, rng, "zh" if language < chinese_share else "en")
        if question is None:
            continue
        key = str((kind, question.answer) if kind == "ground" else question.question)
        if key in seen:
            continue
        seen.add(key)
        if kind in ONCE_PER_PICTURE:
            seen.add(kind)
        questions.append(question)
        if len(questions) == n:
            break
    return questions
