"""Grounding: does the box overlap the right one (RefCOCO, RefCOCO+, RefCOCOg)?

reference: {"box": [x1, y1, x2, y2] in pixels, "width": pixels, "height": pixels}. Reads the reply, the first
"(x1,y1),(x2,y2)". Usual group: split.

The score is the share of boxes with an intersection over union of at least 0.5; a reply without a box is wrong.

official: coordinates are thousandths of the picture, as Qwen-VL's tokenizer draws them.
qwenvl: Qwen-VL's evaluation divides by 999, and computes in float32.
qwenvl_dropped: the same on those samples that it looks at: eight processes share them, each takes batches of 8 and
drops what is left over in the end (`kept`). A few in a thousand are missing, so the number is that of a slightly other
test set.
vlmevalkit: four numbers anywhere in the reply. Up to 1.5 they are parts of the picture, up to 1000 thousandths
(whatever the model means, so boxes in pixels are wrong), else pixels; cut off at the border, turned where they are
inverted.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import field, one_each
from qwenvl_jax.evaluation.task import Prediction

THRESHOLD = 0.5
RANKS, BATCH = 8, 8  # of Qwen-VL's evaluation script
NO_BOX = (0.0, 0.0, 0.0, 0.0)

_POINTS = re.compile(r"\((.*?)\),\((.*?)\)")
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(_NUMBER)
_LIST = re.compile(rf"\[\s*({_NUMBER})" + rf"(?:\s*,\s*|\s+)({_NUMBER})" * 3 + r"\s*\]")

Box = Sequence[float]


def parse_box(reply: str) -> Box | None:
    """The numbers of the first "(x1,y1),(x2,y2)" in a reply; None where there is none, or it is not made of numbers."""
    points = _POINTS.search(reply)
    if points is None:
        return None
    try:
        x1, y1 = map(float, points[1].split(","))
        x2, y2 = map(float, points[2].split(","))
    except ValueError:
        return None
    return x1, y1, x2, y2


def parse_any_box(reply: str) -> Box | None:
    """VLMEvalKit's: the numbers of the first "[x1, y1, x2, y2]", else the first four numbers of a reply."""
    listed = _LIST.search(reply)
    numbers = listed.groups() if listed else _NUMBERS.findall(reply)[:4]
    return [float(number) for number in numbers] if len(numbers) == 4 else None


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes; 0 where it is not a number, or a box is inverted."""
    x1, y1, x2, y2 = first
    u1, v1, u2, v2 = second
    shared = max(min(x2, u2) - max(x1, u1), 0.0) * max(min(y2, v2) - max(y1, v1), 0.0)
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
    overlap = shared / union if union else 0.0
    return overlap if shared and overlap == overlap else 0.0


def float32_iou(first: Box, second: Box) -> float:
    """The same as torchvision computes it, in float32: not a number where both boxes are empty."""
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    with np.errstate(all="ignore"):
        sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
        shared = sides[0] * sides[1]
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return float(shared / (areas - shared))


def official_iou(reply: str, box: Box, width: float, height: float) -> float:
    """How far a reply's box, in thousandths, overlaps one in pixels."""
    x1, y1, x2, y2 = parse_box(reply) or NO_BOX
    return iou((x1 / 1000 * width, y1 / 1000 * height, x2 / 1000 * width, y2 / 1000 * height), box)


def qwenvl_iou(reply: str, box: Box, width: float, height: float) -> float:
    """The same as Qwen-VL's evaluation computes it; nan where it is not a number."""
    with np.errstate(all="ignore"):
        parts = np.asarray(parse_box(reply) or NO_BOX).astype(np.float32) / np.float32(999)
        return float32_iou((parts * np.array([width, height] * 2, np.float32)).tolist(), box)


def vlmevalkit_iou(reply: str, box: Box, width: float, height: float) -> float:
    """The same as VLMEvalKit computes it."""
    found = parse_any_box(reply)
    if found is None or width <= 0 or height <= 0:
        return 0.0
    numbers, size = np.array(found), np.array([width, height] * 2, np.float64)
    largest = np.abs(numbers).max()
    if largest <= 1.5:
        numbers *= size
    elif largest <= 1000:
        numbers = numbers / 1000 * size
    x1, y1, x2, y2 = np.clip(numbers, 0, size).tolist()
    return iou((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), box)


def kept(total: int, ranks: int = RANKS, batch: int = BATCH) -> list[bool]:
    """Which of `total` samples Qwen-VL's evaluation looks at: each rank drops the last odd batch of its run."""
    sizes = [total // ranks + (rank < total % ranks) for rank in range(ranks)]
    return [place < size - size % batch for size in sizes for place in range(size)]


def _reference(prediction: Prediction) -> tuple[list[float], float, float]:
    box, width, height = (field(prediction, name) for name in ("box", "width", "height"))
    try:
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2, y2], float(width), float(height)
    except (TypeError, ValueError):
        raise UserError(
            f"prediction {prediction.id!r}: 'box' of its reference must be four numbers, 'width' and 'height' one, "
            f"not {box!r}, {width!r}, {height!r}"
        ) from None


def _metric(variant: str, overlap: Callable[[str, Box, float, float], float], note: str = "") -> Metric:
    def judge(prediction: Prediction) -> dict[str, float]:
        found = overlap(prediction.reply, *_reference(prediction))
        return {"iou": found if found == found else 0.0, "right": found >= THRESHOLD}

    def units(predictions: Sequence[Prediction]) -> Units:
        if variant == "qwenvl_dropped":
            chosen = zip(predictions, kept(len(predictions)), strict=True)
            predictions = [prediction for prediction, looked_at in chosen if looked_at]
        return one_each(predictions, ("iou", "right"), judge)

    return Metric(
        "grounding", variant, units, (Score("accuracy at IoU 0.5", mean("right")), Score("mean IoU", mean("iou"))), note
    )


VARIANTS = {
    "official": _metric("official", official_iou),
    "qwenvl": _metric("qwenvl", qwenvl_iou, "coordinates are divided by 999; float32"),
    "qwenvl_dropped": _metric(
        "qwenvl_dropped", qwenvl_iou, "as qwenvl, without the last odd batch of each of eight processes"
    ),
    "vlmevalkit": _metric("vlmevalkit", vlmevalkit_iou, "four numbers anywhere, in whatever scale they seem to be"),
}
