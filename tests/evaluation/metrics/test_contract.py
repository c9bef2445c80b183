"""What every metric keeps to, whatever it measures."""

import subprocess
import sys

import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.data.questions import Question
from qwenvl_jax.evaluation.metrics.registry import METRICS, metric
from qwenvl_jax.evaluation.task import Prediction

QUESTION = Question("color", "What colour is it?", "red", "en", {"answer": "red"})
CHOICES = {"answer": 1, "choices": ["a cat", "a dog"]}
YES = {"answer": "yes"}
# A reference of each metric and a reply that is right.
RIGHT: dict[str, tuple[dict, str]] = {
    "anls": ({"answers": ["red"]}, "red"),
    "captions": ({"references": ["a dog runs on the beach"]}, "a dog runs on the beach"),
    "choice_accuracy": (CHOICES, "B"),
    "exact_match": ({"answers": ["red"]}, "Red"),
    "gqa": ({"answers": ["red"]}, "red"),
    "grounding": ({"box": [100, 50, 200, 100], "width": 200, "height": 100}, "<box>(500,500),(1000,1000)</box>"),
    "hallusionbench": (
        {**YES, "category": "VD", "subcategory": "chart", "set_id": "1", "figure_id": "1", "question_id": "0"},
        "Yes.",
    ),
    "mathvista": (
        {"question_type": "free_form", "answer_type": "integer", "precision": None, "answer": "7", "choices": []},
        "It is 7",
    ),
    "mmbench": ({"index": 5, **CHOICES}, "B"),
    "mme": ({"task": "count", "image": "1.jpg", **YES}, "Yes"),
    "mmmu": ({"question_type": "multiple-choice", "answer": "B", "choices": ["a cat", "a dog"]}, "(B)"),
    "mmstar": (CHOICES, "B"),
    "ocrbench": ({"answers": ["exit"], "type": "Regular Text Recognition"}, "It says EXIT."),
    "pope": (YES, "yes"),
    "realworldqa": ({"answer": "B", "choices": ["a cat", "a dog"]}, "B"),
    "relaxed_accuracy": ({"answers": ["100"]}, "104"),
    "scenes": (QUESTION.__dict__, "Red."),
    "seed_bench": ({**CHOICES, "type": 3}, "B"),
    "touchstone": ({"judgements": ["8 10\nwell", "10 8\nwell"]}, "a reply"),
    "vqa_accuracy": ({"answers": ["red"] * 10}, "red"),
}
ALL = [(name, variant) for name, variants in METRICS.items() for variant in variants]
NO_JAVA = [pair for pair in ALL if pair[0] != "captions" or pair[1] == "vlmevalkit"]


def scores(name: str, variant: str, predictions: list[Prediction], weights=None) -> dict[str, float]:
    judge = metric(name, variant)
    units = judge.units(predictions)
    weights = np.ones(len(units.ids)) if weights is None else weights
    return {score.name: score.compute(units, weights) for score in judge.scores}


def predictions(name: str, count: int = 2, **changes) -> list[Prediction]:
    """Right predictions, different where a metric tells them apart."""
    reference, reply = RIGHT[name]
    made = []
    for number in range(count):
        own = dict(reference)
        if name == "mmbench":
            own["index"] = 5 + number
        if name == "mme":
            own["image"] = f"{number // 2}.jpg"
        if name == "hallusionbench":
            own["set_id"] = str(number)
        if name == "captions" and number % 2:
            own["references"] = ["two cats sleep under a table"]
        text = own["references"][0] if name == "captions" else reply
        made.append(Prediction(f"{name}-{number}", text, own, **changes))
    return made


def test_every_metric_has_an_example_here():
    assert set(RIGHT) == set(METRICS)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_registry_names_are_those_of_the_metrics(name, variant):
    judge = metric(name, variant)
    assert (judge.name, judge.variant) == (name, variant)
    assert len({score.name for score in judge.scores}) == len(judge.scores)


@pytest.mark.parametrize("name", METRICS)
def test_official_is_a_variant_without_a_note_unless_it_cannot_be_met(name):
    assert bool(metric(name).note) == (name in {"hallusionbench", "mathvista", "mmmu"})


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_nothing_gives_nan(name, variant):
    assert all(np.isnan(value) for value in scores(name, variant, []).values())


@pytest.mark.parametrize(("name", "variant"), NO_JAVA)
def test_zero_weights_give_nan(name, variant):
    made = predictions(name)
    units = metric(name, variant).units(made)
    assert all(np.isnan(value) for value in scores(name, variant, made, np.zeros(len(units.ids))).values())


@pytest.mark.parametrize(("name", "variant"), NO_JAVA)
def test_what_is_right_is_the_best(name, variant):
    count = 64 if variant == "qwenvl_dropped" else 2
    judge, found = metric(name, variant), scores(name, variant, predictions(name, count))
    headline = found[judge.scores[0].name]
    if name == "captions":
        assert found["BLEU-4"] == pytest.approx(100)
        assert headline == pytest.approx(1000)
    elif name == "mme":
        assert (found["count"], found["total"]) == (200, 200)
    elif name == "touchstone":
        assert (headline, found["reference answer"], found["judged"]) == (1000, 800, 100)
    else:
        assert headline == judge.scores[0].best


@pytest.mark.parametrize(("name", "variant"), NO_JAVA)
def test_a_prediction_with_an_error_is_wrong_whatever_its_reply(name, variant):
    count = 64 if variant == "qwenvl_dropped" else 2
    failed = predictions(name, count, error="out of memory")
    judge, found = metric(name, variant), scores(name, variant, failed)
    assert found[judge.scores[0].name] == 0
    units = judge.units(failed)
    assert not next(iter(units.columns.values())).any()


@pytest.mark.parametrize(("name", "variant"), [pair for pair in NO_JAVA if pair[1] != "qwenvl_dropped"])
def test_units_hold_each_prediction_once_with_its_groups(name, variant):
    made = predictions(name, 3, groups={"half": "first"})
    units = metric(name, variant).units(made)
    assert sorted(id for ids in units.ids for id in ids) == sorted(one.id for one in made)
    assert units.groups["half"] == ["first"] * len(units.ids)
    assert all(column.shape == (len(units.ids),) and column.dtype == np.float64 for column in units.columns.values())


# Those of which a second copy is the same unit, changes how much words tell, or which samples are left out.
NOT_COPIED = ("captions", "mmbench", "mme", "hallusionbench")
COPIED = [pair for pair in NO_JAVA if pair[0] not in NOT_COPIED and pair[1] != "qwenvl_dropped"]


@pytest.mark.parametrize(("name", "variant"), COPIED)
def test_twice_the_weight_is_twice_the_unit(name, variant):
    reference, reply = RIGHT[name]
    right = predictions(name, 1)[0]
    wrong = Prediction("wrong", "?", {**reference, "judgements": ["2 1", "1 2"]} if name == "touchstone" else reference)
    weighted = scores(name, variant, [right, wrong], np.array([2.0, 1.0]))
    copied = scores(name, variant, [right, Prediction("copy", reply, reference), wrong])
    assert weighted == pytest.approx(copied, nan_ok=True)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("scenes",)])
def test_a_missing_field_is_named(name):
    with pytest.raises(UserError, match="prediction 'x'.*has no '"):
        metric(name, "vlmevalkit" if name == "captions" else "official").units([Prediction("x", "B", {"else": 1})])


def test_a_missing_field_of_a_scene_is_named():
    with pytest.raises(UserError, match="prediction 'x'.*has no 'kind'"):
        metric("scenes").units([Prediction("x", "B", {"else": 1})])


def test_unknown_names_get_a_hint():
    with pytest.raises(UserError, match="no metric 'vqa_acuracy'; did you mean 'vqa_accuracy'"):
        metric("vqa_acuracy")
    with pytest.raises(UserError, match="'mme' has no variant 'vlmeval'; did you mean 'vlmevalkit'"):
        metric("mme", "vlmeval")
    with pytest.raises(UserError, match="no variant 'zz'; there are official, "):
        metric("mme", "zz")


def test_scoring_needs_no_jax():
    program = (
        "import sys, qwenvl_jax.evaluation.metrics.registry; print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
