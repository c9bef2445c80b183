"""Every answer, found again from the scene by other means than the code that asked: by reading the question's words."""

import collections
import re

import numpy as np
import pytest

from qwenvl_jax.data.questions import KINDS, View, ask, scene_questions
from qwenvl_jax.data.scene_text import CHINESE, QUESTIONS, RELATION_QUESTIONS, RELATION_YESNO_QUESTIONS
from qwenvl_jax.data.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, sample_scene

ENGLISH = {chinese: english for english, chinese in CHINESE.items() if english in (*COLORS, *SHAPES, "object")}


def all_questions(split, count, seed=0, languages=("en", "zh")):
    for index in range(count):
        scene = sample_scene(seed, split, index)
        view = View(scene)
        rng = np.random.default_rng(index)
        for kind in KINDS:
            for language in languages:
                question = ask(view, kind, rng, language)
                if question is not None:
                    yield scene, question


def descriptions(text, language):
    """(size, colour, shape) of the noun phrases in a text, in order; None for what a phrase leaves out."""
    if language == "zh":
        names = "|".join(sorted(ENGLISH, key=len, reverse=True))
        pattern = rf"(?:(大|小)的)?((?:{names})+)"
        found = []
        for size, run in re.findall(pattern, text):
            words = [ENGLISH[word] for word in re.findall(names, run)]
            color = next((word for word in words if word in COLORS), None)
            shape = next((word for word in words if word in SHAPES), None)
            if words[-1] in (*SHAPES, "object"):
                found.append(({"大": "large", "小": "small"}.get(size), color, shape))
        return found
    plural = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES} | {"objects": "object"}
    nouns = {**{shape: shape for shape in SHAPES}, "object": "object", **plural}
    pattern = rf"(?:\b({'|'.join(SIZES)}) )?(?:\b({'|'.join(COLORS)}) )?\b({'|'.join(sorted(nouns, key=len)[::-1])})\b"
    return [
        (size or None, color or None, None if nouns[noun] == "object" else nouns[noun])
        for size, color, noun in re.findall(pattern, text)
    ]


def matching(scene, description):
    return [
        thing
        for thing in scene.objects
        if all(
            want in (None, have) for want, have in zip(description, (thing.size, thing.color, thing.shape), strict=True)
        )
    ]


def truth(scene, question):
    """The right answer in English, worked out from the words of the question."""
    text = question.question
    found = descriptions(text, question.language)
    things = [matching(scene, description) for description in found]
    if question.kind in ("color", "shape", "size"):
        (only,) = things[0]
        return getattr(only, question.kind)
    if question.kind == "count":
        return str(len(things[0]))
    if question.kind == "exist":
        return "yes" if things[0] else "no"
    (first,), (second,) = things
    if re.search("Compared with|On which side", text):
        first, second = second, first
    if re.search("left|right|右|左", text):
        return "left" if first.x < second.x else "right"
    if re.search("above|below|上面|下面", text):
        return "above" if first.y < second.y else "below"
    return "larger" if first.side > second.side else "smaller"


TO_ENGLISH = {
    **{chinese: english for english, chinese in CHINESE.items()},
    "有": "yes", "没有": "no",
}  # fmt: skip


def in_english(question):
    if question.kind == "relation" and question.answer in ("大", "小"):
        return {"大": "larger", "小": "smaller"}[question.answer]
    if question.kind == "size" and question.answer in ("大", "小"):
        return {"大": "large", "小": "small"}[question.answer]
    return TO_ENGLISH.get(question.answer, question.answer)


@pytest.mark.parametrize("split", ["train", "test"])
def test_short_answers_are_true(split):
    asked = collections.Counter()
    for scene, question in all_questions(split, 250):
        if question.kind in ("color", "shape", "size", "count", "exist", "relation"):
            assert in_english(question) == truth(scene, question), question
            assert question.expected == {"answer": question.answer}
            asked[question.kind, question.language] += 1
    assert len(asked) == 12
    assert min(asked.values()) > 100


def test_yes_and_no_about_relations_are_true():
    for scene, question in all_questions("train", 300):
        if question.kind != "relation_yesno":
            continue
        said = re.search(
            r"\b(left|right|above|below|larger|smaller)\b|(左边|右边|上面|下面)|([大小])吗", question.question
        )
        word = next(filter(None, said.groups()))
        word = {"大": "larger", "小": "smaller"}.get(word, TO_ENGLISH.get(word, word))
        assert in_english(question) == ("yes" if word == truth(scene, question) else "no"), question
        assert question.hard


def test_relations_are_plain_to_see():
    for scene, question in all_questions("train", 200):
        if question.kind not in ("relation", "relation_yesno"):
            continue
        first, second = (matching(scene, found)[0] for found in descriptions(question.question, question.language))
        if re.search("left|right|右|左", question.question):
            assert abs(first.x - second.x) >= 0.15 * scene.width
        elif re.search("above|below|上面|下面", question.question):
            assert abs(first.y - second.y) >= 0.15 * scene.height
        else:
            assert max(first.side, second.side) >= 1.29 * min(first.side, second.side)


def test_reading_captions_and_boxes_are_true():
    kinds = collections.Counter()
    for scene, question in all_questions("test", 200):
        kinds[question.kind] += 1
        if question.kind == "read":
            assert question.answer == scene.text.text
        if question.kind == "caption":
            in_order = sorted(scene.objects, key=lambda thing: thing.x)
            truly = [(thing.size, thing.color, thing.shape) for thing in in_order]
            assert descriptions(question.answer, question.language) == truly
            assert [tuple(thing) for thing in question.expected["objects"]] == truly
            assert question.expected["text"] == (scene.text and scene.text.text)
            assert scene.text is None or question.answer.endswith(scene.text.text)
        if question.kind == "ground":
            (part,) = question.answer
            (thing,) = matching(scene, descriptions(question.question, question.language)[0])
            np.testing.assert_allclose(part["box"], thing.box, atol=0.051)
            assert part["label"] in question.question
            assert question.expected["box"] == part["box"]
        if question.kind == "inside":
            (box,) = (part["box"] for part in question.question if part["type"] == "box")
            (answer,) = descriptions(question.answer, question.language)
            thing = min(scene.objects, key=lambda thing: np.abs(np.array(thing.box) - box).max())
            assert answer == (None, thing.color, thing.shape)
            assert 0 <= box[0] < box[2] <= scene.width
            assert 0 <= box[1] < box[3] <= scene.height
            assert np.abs(np.array(thing.box) - box).max() <= 0.05 * thing.side * 1.3 + 0.06
    assert min(kinds[kind] for kind in ("read", "caption", "ground", "inside")) > 100


def words_of(question):
    contents = (question.question, question.answer)
    return " ".join(
        content
        if isinstance(content, str)
        else " ".join(part.get("text") or part.get("label") or "" for part in content)
        for content in contents
    )


def test_training_never_mentions_a_held_out_pair():
    for split in ("train", "val"):
        for index in range(700):
            scene = sample_scene(0, split, index)
            for question in scene_questions(scene, np.random.default_rng(index), 12):
                named = descriptions(words_of(question), question.language)
                assert not any(pair[1:] in HELD_OUT_PAIRS for pair in named), question
                assert question.held_out is None


def test_held_out_questions_are_flagged():
    flags = collections.Counter()
    for scene, question in all_questions("test", 400):
        flags[question.held_out] += 1
        assert ("count" in (question.held_out or "")) == (len(scene.objects) == 5)
        named = {pair[1:] for pair in descriptions(words_of(question), question.language)}
        if named & set(HELD_OUT_PAIRS):
            assert "pair" in question.held_out
        if not scene.has_held_out_pair and question.kind != "exist":
            assert "pair" not in (question.held_out or "")
    assert set(flags) == {None, "pair", "count", "pair+count"}


def test_no_answer_is_a_good_guess():
    answers = collections.defaultdict(collections.Counter)
    for _, question in all_questions("train", 1500, languages=("en",)):
        if isinstance(question.answer, str):
            answers[question.kind][question.answer] += 1
    share = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    assert 0.46 < share["exist"] < 0.54
    assert 0.45 < share["relation_yesno"] < 0.55
    assert share["size"] < 0.58
    assert share["relation"] < 0.27  # six answers on three axes
    assert share["count"] < 0.30
    assert share["color"] < 0.17
    assert share["shape"] < 0.21
    assert max(share["inside"], share["read"], share["caption"]) < 0.06


def test_scene_questions_differ_and_follow_the_weights():
    for index in range(60):
        scene = sample_scene(0, "train", index)
        questions = scene_questions(scene, np.random.default_rng(index), n=9)
        assert len(questions) == 9
        assert len({str(question.question) for question in questions}) == 9
        again = scene_questions(scene, np.random.default_rng(index), n=9)
        assert questions == again
    only = scene_questions(scene, np.random.default_rng(0), 5, {"ground": 1.0, "count": 1.0}, chinese_share=0)
    assert {question.kind for question in only} <= {"ground", "count"}
    assert {question.language for question in only} == {"en"}
    with pytest.raises(KeyError, match="colour"):
        scene_questions(scene, np.random.default_rng(0), 5, {"colour": 1.0})


def test_a_quarter_is_chinese_and_every_kind_has_several_phrasings():
    languages = collections.Counter(
        question.language
        for index in range(300)
        for question in scene_questions(sample_scene(0, "train", index), np.random.default_rng(index))
    )
    assert 0.21 < languages["zh"] / languages.total() < 0.29
    for kind in set(KINDS) - {"relation", "relation_yesno"}:
        assert len(set(QUESTIONS[kind]["en"])) >= 6
        assert len(set(QUESTIONS[kind]["zh"])) >= 4
    assert all(len(set(table["en"])) >= 6 for table in RELATION_QUESTIONS.values())
    assert sum(len(table["en"]) for table in RELATION_YESNO_QUESTIONS.values()) >= 6


def test_messages_put_the_picture_first():
    scene = sample_scene(0, "train", 0)
    picture = scene.draw()
    for question in scene_questions(scene, np.random.default_rng(0)):
        user, assistant = question.messages(picture)
        assert user["role"] == "user"
        assert user["content"][0] == {"type": "image", "image": picture}
        assert assistant == {"role": "assistant", "content": question.answer}
