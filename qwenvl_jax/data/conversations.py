"""Conversations about scenes: several questions in a row about one picture, and questions about two pictures.

`record` turns (seed, split, index) into one training record, in the message format of every other data source.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from qwenvl_jax.data.questions import (
    Question,
    Reference,
    View,
    as_parts,
    choose_count,
    choose_existence,
    held_out,
    pick,
    scene_questions,
)
from qwenvl_jax.data.scene_text import PICTURE_QUESTIONS, name, translate, with_article
from qwenvl_jax.data.scenes import Scene, sample_scene, scene_rng

SECOND_PICTURE = 2**40  # added to a record's index to draw its second picture; no record has so high an index itself


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One or two scenes, shown before the first question, and the questions asked in turn."""

    scenes: tuple[Scene, ...]
    turns: tuple[Question, ...]

    def messages(self, images=None) -> list[dict]:
        """The conversation in the message format; `images` are drawn at native size where none are given."""
        images = [scene.draw() for scene in self.scenes] if images is None else images
        messages: list[dict] = []
        for turn in self.turns:
            content = as_parts(turn.question)
            if not messages:
                content = [{"type": "image", "image": image} for image in images] + content
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages


def multi_turn(
    scene: Scene, rng: np.random.Generator, max_turns: int = 4, chinese_share: float = 0.25, weights=None
) -> Conversation:
    """Two to `max_turns` different questions in one language about one picture; none leans on the turn before."""
    language_share = 1.0 if rng.random() < chinese_share else 0.0
    count = int(rng.integers(2, max_turns + 1))
    return Conversation((scene,), tuple(scene_questions(scene, rng, count, weights, chinese_share=language_share)))


def two_pictures(
    first: Scene, second: Scene, rng: np.random.Generator, max_turns: int = 3, chinese_share: float = 0.25
) -> Conversation:
    """One to `max_turns` questions in one language that need both pictures, or name the one they are about."""
    language = "zh" if rng.random() < chinese_share else "en"
    scenes = (first, second)
    wanted = int(rng.integers(1, max_turns + 1))
    turns: dict[str, Question] = {}
    for _ in range(8 * wanted):
        question = pick(rng, PICTURE_ASKERS)(scenes, rng, language)
        if question is not None:
            turns.setdefault(question.question, question)
        if len(turns) == wanted:
            break
    return Conversation(scenes, tuple(turns.values()))


def _question(form: str, rng, language: str, answer: str, flag: str | None, **slots) -> Question:
    text = pick(rng, PICTURE_QUESTIONS[form][language]).format(**slots)
    return Question("two_pictures", text, answer, language, {"answer": answer}, held_out=flag)


def _ask_count(scenes, rng, language: str) -> Question:
    number = int(rng.integers(2))
    # What is counted is chosen from either picture, so that its name does not give away where it stands.
    reference, _ = choose_count(scenes[int(rng.integers(2))], rng)
    found = [thing for thing in scenes[number].objects if reference.fits(thing)]
    things = reference.name(language, plural=True)
    flag = held_out(scenes[number], found)
    return _question("count", rng, language, str(len(found)), flag, things=things, k=number + 1)


def _ask_more(scenes, rng, language: str) -> Question | None:
    counts = [len(scene.objects) for scene in scenes]
    if counts[0] == counts[1]:
        return None
    answer = f"Picture {1 if counts[0] > counts[1] else 2}"
    return _question("more", rng, language, answer, _joined(held_out(scene, scene.objects) for scene in scenes))


def _joined(flags: Iterable[str | None]) -> str | None:
    """`held_out` of several scenes at once."""
    names = {name for flag in flags if flag for name in flag.split("+")}
    return "+".join(sorted(names, reverse=True)) or None


def _ask_which(scenes, rng, language: str) -> Question:
    """Something that stands in picture 1, in picture 2, in both or in neither, as often as the scenes allow."""
    wanted = pick(rng, ((True, False), (False, True), (True, True), (False, False)))
    reference = Reference(None, None, None)
    for _ in range(12):
        source = scenes[wanted.index(True)] if wanted[0] != wanted[1] else pick(rng, scenes)
        reference = choose_existence(source, rng, present=any(wanted))
        if _shown(scenes, reference) == wanted:
            break
    answer = {
        (True, False): "Picture 1",
        (False, True): "Picture 2",
        (True, True): translate("both", language),
        (False, False): translate("neither", language),
    }[_shown(scenes, reference)]
    ref = reference.name(language)
    things = [(scene, thing) for scene in scenes for thing in scene.objects if reference.fits(thing)]
    flag = _joined(held_out(scene, [thing]) for scene, thing in things)
    return _question("which", rng, language, answer, flag, thing=with_article(ref), ref=ref)


def _shown(scenes, reference: Reference) -> tuple[bool, bool]:
    first, second = (any(reference.fits(thing) for thing in scene.objects) for scene in scenes)
    return first, second


def _ask_color(scenes, rng, language: str) -> Question | None:
    number = int(rng.integers(2))
    view = View(scenes[number])
    candidates = view.referable(("color",))
    if not candidates:
        return None
    index = pick(rng, candidates)
    thing = scenes[number].objects[index]
    reference = view.refer(rng, index, without=("color",))
    ref = name(language, reference.size, None, reference.shape)
    flag = held_out(scenes[number], [thing])
    return _question("color", rng, language, translate(thing.color, language), flag, ref=ref, k=number + 1)


def _ask_read(scenes, rng, language: str) -> Question | None:
    number = int(rng.integers(2))
    text = scenes[number].text
    if text is None:
        return None
    return _question("read", rng, language, text.text, held_out(scenes[number], ()), k=number + 1)


PICTURE_ASKERS = (_ask_count, _ask_more, _ask_which, _ask_color, _ask_read)


def conversation(seed: int, split: str, index: int, max_objects: int = 6) -> Conversation:
    """The conversation of (seed, split, index): a quarter one question, half several turns, a quarter two pictures."""
    scene = sample_scene(seed, split, index, max_objects)
    rng = scene_rng(seed, split, index, stream=1)
    kind = rng.random()
    if kind < 0.25:
        return two_pictures(scene, sample_scene(seed, split, index + SECOND_PICTURE, max_objects), rng)
    if kind < 0.75:
        return multi_turn(scene, rng)
    return Conversation((scene,), tuple(scene_questions(scene, rng, 1)))


def record(seed: int, split: str, index: int, max_objects: int = 6) -> dict:
    """One training record: {"id": str, "messages": [...]} with the pictures as PIL images in the first message."""
    messages = conversation(seed, split, index, max_objects).messages()
    return {"id": f"scenes-{split}-{seed}-{index}", "messages": messages}
