"""Scores of predictions: what is counted, broken down, listed and kept, and what a fixed reply would get."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from evaluation.runs import ACCURACY, run

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.baseline import Guess, best_fixed_reply
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.scores import from_json, interval_text, score, to_json, value_text
from qwenvl_jax.evaluation.task import Prediction


def grouped() -> list[Prediction]:
    """Six predictions, of which the last failed and the first is of no category."""
    replies = run(["yes", "yes", "no", "yes", "no", None])
    labels = ["", "a", "a", "b", "b", "b"]
    return [dataclasses.replace(p, groups={"category": label}) for p, label in zip(replies, labels, strict=True)]


def test_scores_by_hand():
    found = score(grouped(), ACCURACY, resamples=200)
    assert found.headline.value == pytest.approx(50)
    assert found.headline.low < 50 < found.headline.high
    assert (found.samples, found.headline.n, found.headline.failed) == (6, 6, 1)
    assert [(failure.id, failure.error) for failure in found.failures] == [("5", "no picture")]
    assert found.columns == {"right": [1, 1, 0, 1, 0, 0]}
    assert found.ids[4] == ("4",)
    numbers = {label: numbers[0] for label, numbers in found.groups["category"].items()}
    assert {label: (number.n, number.failed) for label, number in numbers.items()} == {"a": (2, 0), "b": (3, 1)}
    assert numbers["b"].value == pytest.approx(100 / 3)


def test_groups_are_those_asked_for():
    assert score(grouped(), ACCURACY, groups=(), resamples=10).groups == {}
    assert score(grouped(), ACCURACY, groups=("other",), resamples=10).groups == {}


def test_pictures_are_counted():
    predictions = run(["yes", "no", "yes"], pictures=("a.png",)) + [
        dataclasses.replace(p, id=f"other {p.id}") for p in run(["yes", "no"])
    ]
    assert score(predictions, ACCURACY, resamples=10).pictures == 3  # a.png, and two questions on their own


def test_scores_survive_their_file():
    nothing = Score("of nothing", lambda units, weights: math.nan, best=2000)
    metric = dataclasses.replace(ACCURACY, scores=(*ACCURACY.scores, nothing), note="a note")
    found = score(grouped(), metric, resamples=50)
    text = to_json(found)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert repr(from_json(text)) == repr(found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metric": "accuracy", "numbers": 3}', "null"])
def test_a_file_that_holds_no_scores_is_named(text):
    with pytest.raises(UserError, match=r"^mine\.json: "):
        from_json(text, "mine.json")


def test_nothing_at_all_can_be_scored():
    found = score([], ACCURACY)
    assert math.isnan(found.headline.value)
    assert interval_text(found.headline) == ""
    assert from_json(to_json(found)).samples == 0


@pytest.mark.parametrize(
    ("value", "best", "text"),
    [(47.333, 100, "47.33"), (1487.58, 2000, "1,487.6"), (0.5, 1, "0.500"), (math.nan, 100, "-"), (-3.0, 100, "-3.00")],
)
def test_values_are_short(value, best, text):
    assert value_text(value, best) == text


def test_the_best_fixed_reply_is_the_majority():
    answers = ["yes"] * 3 + ["no"] * 5
    predictions = [
        Prediction(str(number), "green", {"answers": [answer], "kind": "colour"})
        for number, answer in enumerate(answers)
    ]
    assert best_fixed_reply(predictions, ACCURACY) == Guess("no", 62.5)


def test_the_best_choice_is_tried_by_number():
    def right(predictions):
        return Units(
            [(p.id,) for p in predictions],
            {"right": np.array([p.choice == p.reference["answer"] for p in predictions], float)},
        )

    metric = Metric("choice", "official", right, (Score("accuracy", mean("right")),))
    predictions = [
        Prediction(str(number), "A", {"answer": number % 3 % 2, "choices": ["x", "y"]}, choice=0) for number in range(9)
    ]
    assert best_fixed_reply(predictions, metric) == Guess("A", pytest.approx(100 * 6 / 9))


def test_the_median_box_is_a_guess():
    def overlaps(predictions):
        hits = [p.reply == "(100,200),(300,400)" for p in predictions]
        return Units([(p.id,) for p in predictions], {"right": np.array(hits, float)})

    metric = Metric("grounding", "official", overlaps, (Score("accuracy", mean("right")),))
    corners = ([10, 40, 30, 80], [5, 40, 30, 80], [90, 40, 30, 80])
    predictions = [
        Prediction(str(number), "none", {"box": box, "width": 100, "height": 200}) for number, box in enumerate(corners)
    ]
    assert best_fixed_reply(predictions, metric) == Guess("(100,200),(300,400)", 100.0)


def test_there_is_no_guess_where_replies_are_not_read():
    def judged(predictions):
        return Units([(p.id,) for p in predictions], {"right": np.ones(len(predictions))})

    assert best_fixed_reply(run(["a", "b"]), Metric("judge", "official", judged, ACCURACY.scores)) is None
    assert best_fixed_reply([], ACCURACY) is None


MODULES = ("command", "compare", "statistics", "published", "html_report", "html_comparison")


def test_scoring_and_reports_do_without_jax():
    names = ", ".join(f"qwenvl_jax.evaluation.{module}" for module in MODULES)
    code = f"import sys, {names}; print(sorted({{'jax', 'jaxlib', 'flax', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
