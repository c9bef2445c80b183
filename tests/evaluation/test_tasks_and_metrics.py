"""Readers and metrics together: who answers what the references say gets full marks, whoever says nothing none."""

import numpy as np
import pytest

from qwenvl_jax.evaluation import miniature
from qwenvl_jax.evaluation.task import Prediction, Reading
from qwenvl_jax.evaluation.tasks.registry import TASKS

registry = pytest.importorskip("qwenvl_jax.evaluation.metrics.registry", reason="there are no metrics yet")
# Captions are compared by counts of words in the whole set, and TouchStone by a judge: no reply is right by itself.
JUDGED = [name for name, task in TASKS.items() if task.metric not in ("", "captions", "touchstone")]
ASKED = 100  # scenes; the others have fewer


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature") / "data"
    miniature.draw(folder)
    return folder


def box(corners, size):
    x1, y1, x2, y2 = (round(999 * value / extent) for value, extent in zip(corners, (*size, *size), strict=True))
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def right_reply(sample):
    """The text of the right answer, and its number among choices that are ranked."""
    reference = sample.reference
    size = reference.get("width"), reference.get("height")
    if "expected" in reference and "box" in reference["expected"]:
        return box(reference["expected"]["box"], size), None
    if "box" in reference:
        return box(reference["box"], size), None
    answer = reference["answers"] if "answers" in reference else reference["answer"]
    answer = answer[0] if isinstance(answer, list) else answer
    if "answer_type" in reference and reference["choices"]:
        answer = reference["choices"].index(answer)
    letter = "ABCD"[answer] if isinstance(answer, int) else answer
    return letter, "ABCD".index(letter) if sample.choices else None


@pytest.mark.parametrize("style", ["qwenvl", "chat"])
@pytest.mark.parametrize("name", [name for name in JUDGED if "mmbench_test" not in name])
def test_true_answers_get_full_marks(name, style, drawn):
    metric = registry.metric(TASKS[name].metric)
    samples = [sample for sample, _ in zip(TASKS[name].read(drawn, Reading(style=style)), range(ASKED), strict=False)]
    assert samples
    right, wrong = [], []
    for sample in samples:
        reply, choice = right_reply(sample)
        common = {"id": sample.id, "reference": sample.reference, "groups": sample.groups, "question": sample.question}
        right.append(Prediction(reply=reply, choice=choice, **common))
        wrong.append(Prediction(reply="", error="no picture", **common))
    headline = metric.scores[0]
    for predictions, expected in ((right, headline.best), (wrong, 0)):
        units = metric.units(predictions)
        weights = np.ones(len(units.ids))
        if metric.name != "ocrbench" or expected == 0:  # a sum of points there, of a thousand questions
            assert headline.compute(units, weights) == pytest.approx(expected)
        assert {id for ids in units.ids for id in ids} == {sample.id for sample in samples}
