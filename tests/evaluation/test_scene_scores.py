"""Scores of scene predictions: hand-made replies, true ones, blind ones, and the script that scores a file."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.data.questions import KINDS, Question
from qwenvl_jax.evaluation import scenes

REPOSITORY = Path(__file__).parents[2]
ITEMS = scenes.question_set(80)


def question(kind, expected, language="en", **fields):
    return Question(kind, "?", "", language, expected, **fields)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("red", True),
        (" Red. ", True),
        ("RED!", True),
        ("ｒｅｄ", True),
        ("dark red", False),
        ("red or blue", False),
        ("", False),
    ],
)
def test_short_answers(reply, right):
    assert scenes.score(question("color", {"answer": "red"}), reply) == {"right": right}


def test_short_answers_in_chinese():
    assert scenes.score(question("color", {"answer": "红色"}, "zh"), "红色。")["right"]
    assert not scenes.score(question("color", {"answer": "红色"}, "zh"), "红")["right"]
    assert not scenes.score(question("relation_yesno", {"answer": "是"}, "zh"), "不是")["right"]
    assert not scenes.score(question("count", {"answer": "3"}), "13")["right"]


def test_grounding_needs_half_an_overlap():
    truth = question("ground", {"box": [10.0, 10.0, 30.0, 30.0]})
    assert scenes.score(truth, "", [(10, 10, 30, 30)]) == {"right": True, "iou": 1.0}
    assert scenes.score(truth, "", [(10, 10, 30, 20)]) == {"right": True, "iou": 0.5}
    assert scenes.score(truth, "", [(10, 10, 30, 19)]) == {"right": False, "iou": 0.45}
    assert scenes.score(truth, "", [(40, 40, 60, 60)]) == {"right": False, "iou": 0.0}
    assert scenes.score(truth, "", [(0, 0, 1, 1), (10, 10, 30, 30)])["right"] is False  # the first box counts
    assert scenes.score(truth, "here", []) == {"right": False, "iou": 0.0}
    assert scenes.iou((5, 5, 5, 9), (5, 5, 5, 9)) == 0.0


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("a red circle", True),
        ("A large red circle.", True),
        ("红色圆形", True),
        ("红色的圆形", True),
        ("a red square", False),
        ("circle", False),
        ("a red circle and a blue star", False),
    ],
)
def test_inside(reply, right):
    assert scenes.score(question("inside", {"color": "red", "shape": "circle"}), reply)["right"] is right


def test_caption_needs_every_object_and_no_other():
    objects = [["large", "red", "circle"], ["small", "blue", "star"], ["small", "blue", "star"]]
    truth = question("caption", {"objects": objects, "text": "CAT"})

    def found(reply):
        return tuple(scenes.score(truth, reply).values())

    assert found("a large red circle, a small blue star, a small blue star and the word CAT") == (True, True, True)
    assert found("a small blue star, a large red circle, a small blue star") == (True, True, False)
    assert found("a small red circle, a small blue star, a small blue star and the word CATS") == (True, False, False)
    assert found("a large red circle, a small blue star and the word CAT") == (False, False, True)
    assert found("a large red circle and three small blue stars") == (False, False, False)
    assert found("一个大的红色圆形、一个小的蓝色星形、一个小的蓝色星形和单词CAT") == (True, True, True)
    silent = question("caption", {"objects": objects[:1], "text": None})
    assert scenes.score(silent, "a large red circle") == {"right": True, "sizes": True}


def test_the_set_is_fixed_and_asks_every_kind_that_applies():
    again = scenes.question_set(80)
    assert [dataclasses.asdict(item.question) for item in again] == [dataclasses.asdict(i.question) for i in ITEMS]
    assert len({item.id for item in ITEMS}) == len(ITEMS)
    asked = {}
    for item in ITEMS:
        asked.setdefault(item.scene.index, []).append(item.question.kind)
    assert all(len(set(kinds)) == len(kinds) for kinds in asked.values())
    assert all({"count", "exist", "caption", "inside"} <= set(kinds) for kinds in asked.values())
    assert {kind for kinds in asked.values() for kind in kinds} == set(KINDS)
    assert all(item.scene.split == "val" for item in scenes.question_set(5, split="val"))


def true_reply(item):
    answer = item.question.answer
    if isinstance(answer, str):
        return answer, []
    return "", [answer[0]["box"]]


def test_true_replies_are_all_right():
    result = scenes.report([scenes.prediction(item, *true_reply(item)) for item in ITEMS])
    assert set(result["kinds"]) == set(KINDS) - {"relation_yesno"}
    assert set(result["hard"]) == {"relation_yesno"}
    tables = {**result["kinds"], **result["hard"]}
    assert all(group["right"] == group["of"] for groups in tables.values() for group in groups.values())
    assert sum(groups["all"]["of"] for groups in tables.values()) == len(ITEMS) == result["questions"]
    for groups in tables.values():
        assert groups["English"]["of"] + groups["Chinese"]["of"] == groups["all"]["of"]
        outside = groups["all"]["of"] - groups["seen"]["of"]
        assert max(groups["held-out pair"]["of"], groups["held-out count"]["of"]) <= outside
        assert groups["held-out pair"]["of"] + groups["held-out count"]["of"] >= outside
    assert result["details"]["ground"]["iou"] == 1.0
    assert result["details"]["caption"] == {"sizes": 1.0, "text": 1.0}


def test_groups_count_their_own_errors():
    predictions = [scenes.prediction(item, *true_reply(item)) for item in ITEMS]
    wrong = [{**p, "reply": "?", "boxes": []} if "pair" in (p["held_out"] or "") else p for p in predictions]
    groups = scenes.report(wrong)["kinds"]["caption"]
    assert groups["held-out pair"]["of"] > 0
    assert groups["held-out pair"]["right"] == 0
    assert groups["seen"]["accuracy"] == 1.0
    assert groups["all"]["right"] == groups["all"]["of"] - groups["held-out pair"]["of"]


def test_priors_are_low_and_no_worse_than_one_answer_for_all():
    questions = [item.question for item in scenes.question_set(600)]
    prior = scenes.priors(questions)
    limits = {
        "color": 0.18,
        "shape": 0.23,
        "count": 0.30,
        "ground": 0.03,
        "inside": 0.06,
        "caption": 0.03,
        "read": 0.12,
    }
    assert all(prior[kind] < limit for kind, limit in limits.items())
    assert all(0.45 < prior[kind] < 0.6 for kind in ("exist", "relation", "relation_yesno", "size"))
    of_kind = [q for q in questions if q.kind == "exist" and q.language == "en"]
    assert (
        0.5
        <= scenes.priors(of_kind)["exist"]
        == pytest.approx(max(np.mean([q.answer == word for q in of_kind]) for word in ("yes", "no")))
    )


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263 and 15/148, 0/20, 1/29.
    for (right, of), interval in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert scenes.wilson(right, of) == pytest.approx(interval, abs=6e-5)
    assert scenes.wilson(0, 0) == (0.0, 1.0)


def test_grey_noise_keeps_the_size_and_nothing_else():
    picture = ITEMS[0].scene.draw()
    noise = scenes.grey_noise(picture)
    pixels = np.asarray(noise, int)
    assert (noise.size, noise.mode) == (picture.size, "RGB")
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert 20 < pixels.std() < 60
    assert np.array_equal(noise, scenes.grey_noise(Image.new("RGB", picture.size)))


@dataclasses.dataclass
class Answerer:
    """The real interface of a model, answering from a table; keeps what it was shown."""

    answers: dict
    seen: list = dataclasses.field(default_factory=list)
    sizes: list = dataclasses.field(default_factory=list)

    def batch(self, conversations, max_new_tokens):
        self.seen += conversations
        self.sizes.append(len(conversations))
        return [Reply(*self.answers[key_of(conversation)]) for conversation in conversations]


@dataclasses.dataclass
class Corners:
    x1: float
    y1: float
    x2: float
    y2: float


class Reply:
    def __init__(self, text, boxes):
        self.text = text
        self.boxes = [Corners(*box) for box in boxes]


def key_of(conversation):
    (message,) = conversation
    assert message["role"] == "user"
    image, *parts = message["content"]
    return image["image"].size, repr(parts)


def answerer(items):
    return Answerer({key_of(item.question.messages(item.scene.draw())[:1]): true_reply(item) for item in items})


def test_evaluate_asks_everything_in_batches_and_writes_predictions(tmp_path):
    items = scenes.question_set(4)
    model = answerer(items)
    steps = []
    path = tmp_path / "predictions.jsonl"
    predictions = scenes.evaluate(
        model, 4, batch_size=5, predictions=path, progress=lambda done, total: steps.append((done, total))
    )
    assert [p["id"] for p in predictions] == [item.id for item in items]
    assert max(model.sizes) == 5
    assert steps[-1] == (len(items), len(items))
    result = scenes.report(predictions)
    assert all(groups["all"]["accuracy"] == 1 for groups in result["kinds"].values())
    stored = scenes.read_predictions(path)
    assert sorted(stored, key=lambda p: p["id"]) == sorted(json.loads(json.dumps(predictions)), key=lambda p: p["id"])
    assert scenes.report(stored)["kinds"] == result["kinds"]


def test_blind_evaluation_shows_noise_only():
    items = scenes.question_set(2)
    model = answerer(items)
    scenes.evaluate(model, 2, blind=True)
    shown = [conversation[0]["content"][0]["image"] for conversation in model.seen]
    assert all(np.array_equal(picture, scenes.grey_noise(picture)) for picture in shown)


def test_a_broken_predictions_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(UserError, match="no such file"):
        scenes.read_predictions(path)
    good = json.dumps(scenes.prediction(ITEMS[0], "red"))
    for bad in ("not json", '{"id": "x"}', good.replace('"kind": "', '"kin": "')):
        path.write_text(good + "\n" + bad + "\n", encoding="utf-8")
        with pytest.raises(UserError, match="line 2"):
            scenes.read_predictions(path)
