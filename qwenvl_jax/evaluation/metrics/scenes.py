"""Scenes that this project draws: whether a reply is right, as `evaluation/scenes.py` says for each kind of question.

reference: the fields of the question (`dataclasses.asdict` of a `data.questions.Question`) and, for boxes, either
"boxes": [[x1, y1, x2, y2] in pixels, ...] as the reply has them, or "width" and "height" of the picture, where the
reply has its first box as "(x1,y1),(x2,y2)" in thousandths. Reads the reply. Groups kind, language and held_out are
there without being given.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qwenvl_jax.evaluation.metrics.grounding import parse_box
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import field, one_each, text
from qwenvl_jax.evaluation.task import Prediction

GROUPS = ("kind", "language", "held_out")


def boxes_of(prediction: Prediction) -> list[Sequence[float]]:
    """The boxes of a reply in pixels; of those in its text only the first."""
    if "boxes" in prediction.reference:
        return list(field(prediction, "boxes"))
    box = parse_box(prediction.reply)
    if box is None or "width" not in prediction.reference:
        return []
    size = (field(prediction, "width"), field(prediction, "height")) * 2
    return [[value / 1000 * side for value, side in zip(box, size, strict=True)]]


def scene_record(prediction: Prediction) -> dict[str, Any]:
    """The prediction as `evaluation.scenes.report` takes it."""
    boxes = [] if prediction.error is not None else boxes_of(prediction)
    return {**prediction.reference, "reply": prediction.reply, "boxes": boxes}


def _judge(prediction: Prediction) -> dict[str, float]:
    from qwenvl_jax.data.questions import Question  # with all that draws scenes: not for other metrics
    from qwenvl_jax.evaluation.scenes import score

    question = Question(**{part.name: field(prediction, part.name) for part in dataclasses.fields(Question)})
    return {"right": score(question, prediction.reply, boxes_of(prediction))["right"]}


def units(predictions: Sequence[Prediction]) -> Units:
    """Each question with its kind, its language and what was held out in training."""
    found = one_each(predictions, ("right",), _judge)
    own = {name: [text(one.reference.get(name)) for one in predictions] for name in GROUPS}
    return dataclasses.replace(found, groups={**own, **found.groups})


VARIANTS = {"official": Metric("scenes", "official", units, (Score("accuracy", mean("right")),))}
