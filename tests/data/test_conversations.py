"""Several turns and two pictures: answers worked out again from the words of the questions."""

import collections
import re

import numpy as np
from PIL import Image

from qwenvl_jax.data.conversations import conversation, multi_turn, record, two_pictures
from qwenvl_jax.data.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, sample_scene


def pairs_of_scenes(split, count):
    for index in range(count):
        first, second = (sample_scene(0, split, 2 * index + k) for k in (0, 1))
        yield first, second, two_pictures(first, second, np.random.default_rng(index), chinese_share=0)


def fits(thing, text):
    color = next((color for color in COLORS if f" {color} " in f" {text} "), None)
    shape = next((shape for shape in SHAPES if shape in text), None)
    return color in (None, thing.color) and shape in (None, thing.shape)


def test_answers_about_two_pictures_are_true():
    forms = collections.Counter()
    for first, second, talk in pairs_of_scenes("test", 500):
        assert talk.scenes == (first, second)
        assert 1 <= len(talk.turns) <= 3
        for turn in talk.turns:
            text = turn.question.replace("objects", "").replace("object", "")
            number = re.search(r"Picture (\d)", text)
            scene = number and (first, second)[int(number[1]) - 1]
            if "more" in text:
                counts = len(first.objects), len(second.objects)
                assert counts[0] != counts[1]
                assert turn.answer == f"Picture {1 + int(counts[1] > counts[0])}"
            elif scene is None:
                shown = tuple(any(fits(thing, text.rstrip("?")) for thing in each.objects) for each in (first, second))
                names = {(True, False): "Picture 1", (False, True): "Picture 2", (True, True): "both"}
                assert turn.answer == names.get(shown, "neither")
            elif "color" in text:
                wanted = text.replace("what color", "").replace("What color", "")
                size = next((size for size in ("small", "large") if size in text), None)
                found = [t for t in scene.objects if fits(t, wanted.rstrip("?")) and size in (None, t.size)]
                assert [t.color for t in found] == [turn.answer]
            elif "text" in text or "written" in text:
                assert turn.answer == scene.text.text
            else:
                named = re.sub(r"[.?,]|How many|how many|Count|Picture \d", " ", text)
                assert turn.answer == str(sum(fits(thing, named) for thing in scene.objects))
            forms[turn.answer] += 1
    assert {"Picture 1", "Picture 2", "both", "neither", "0", "1", "red"} <= set(forms)
    assert 0.4 < forms["Picture 1"] / (forms["Picture 1"] + forms["Picture 2"]) < 0.6


def test_two_pictures_in_chinese():
    for index in range(50):
        first, second = (sample_scene(0, "train", 2 * index + k) for k in (0, 1))
        for turn in two_pictures(first, second, np.random.default_rng(index), chinese_share=1).turns:
            assert turn.language == "zh"
            assert re.search("[一-鿿]", turn.question)
            assert not re.search("[A-Za-z]", turn.question.replace("Picture", ""))


def test_training_conversations_mention_no_held_out_pair():
    for index in range(1500):
        for turn in conversation(0, "train", index).turns:
            words = str(turn.question) + str(turn.answer)
            for color, shape in HELD_OUT_PAIRS:
                assert f"{color} {shape}" not in words


def test_multi_turn_keeps_one_language_and_asks_different_things():
    turns = collections.Counter()
    for index in range(80):
        talk = multi_turn(sample_scene(0, "train", index), np.random.default_rng(index))
        turns[len(talk.turns)] += 1
        assert len({turn.language for turn in talk.turns}) == 1
        assert len({str(turn.question) for turn in talk.turns}) == len(talk.turns)
    assert set(turns) == {2, 3, 4}


def test_messages_show_the_pictures_once_before_the_first_question():
    for index in range(60):
        talk = conversation(0, "train", index)
        messages = talk.messages()
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(talk.turns)
        parts = [part for message in messages[::2] for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        assert len(images) == len(talk.scenes)
        assert [part["type"] for part in parts[: len(images)]] == ["image"] * len(images)
        assert [image.size for image in images] == [(scene.width, scene.height) for scene in talk.scenes]
        assert [message["content"] for message in messages[1::2]] == [turn.answer for turn in talk.turns]


def test_records_are_reproducible_and_of_all_kinds():
    kinds = collections.Counter()
    for index in range(60):
        first, second = record(5, "val", index), record(5, "val", index)
        assert first["id"] == f"scenes-val-5-{index}"
        assert repr_without_pixels(first) == repr_without_pixels(second)
        images = [part for part in first["messages"][0]["content"] if part["type"] == "image"]
        kinds[len(images), min(len(first["messages"]), 4)] += 1
    assert {(1, 2), (1, 4), (2, 2), (2, 4)} <= set(kinds)


def repr_without_pixels(value):
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: repr_without_pixels(item) for key, item in value.items()}
    if isinstance(value, list):
        return [repr_without_pixels(item) for item in value]
    return value
