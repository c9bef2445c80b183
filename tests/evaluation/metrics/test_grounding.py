"""Grounding: boxes in replies, and how far they overlap."""

import math

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics import grounding
from qwenvl_jax.evaluation.metrics.registry import metric
from qwenvl_jax.evaluation.task import Prediction

BOX = [10.0, 20.0, 110.0, 220.0]


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", (1, 2, 3, 4)),
        ("(1.5, 2),( 3,-4)", (1.5, 2, 3, -4)),
        ("(1,2), (3,4)", None),
        ("(1,2,3),(4,5)", None),
        ("(a,b),(c,d)", None),
        ("(1,2)", None),
        ("", None),
        ("((1,2),(3,4)", None),
    ],
)
def test_boxes_in_replies(reply, box):
    assert grounding.parse_box(reply) == box


@pytest.mark.parametrize(
    ("box", "overlap"),
    [
        (BOX, 1.0),
        ([10, 20, 60, 220], 0.5),
        ([110, 20, 210, 220], 0.0),
        ([110, 220, 10, 20], 0.0),  # inverted
        ([0, 0, 0, 0], 0.0),
        ([math.nan, 20, 110, 220], 0.0),
        ([-math.inf, -math.inf, math.inf, math.inf], 0.0),
    ],
)
def test_iou(box, overlap):
    assert grounding.iou(box, BOX) == pytest.approx(overlap)


def test_half_is_enough_and_scales_differ():
    reply = "<box>(0,0),(500,1000)</box>"
    right = {
        variant: metric("grounding", variant)
        .units([Prediction("1", reply, {"box": [0, 0, 1000, 1000], "width": 1000, "height": 1000})])
        .columns["right"][0]
        for variant in ("official", "qwenvl", "vlmevalkit")
    }
    assert right == {"official": 1, "qwenvl": 1, "vlmevalkit": 1}
    assert grounding.official_iou(reply, [0, 0, 1000, 1000], 1000, 1000) == 0.5
    assert grounding.qwenvl_iou(reply, [0, 0, 1000, 1000], 1000, 1000) > 0.5  # 500/999


def test_two_empty_boxes_have_no_overlap_to_qwenvl():
    assert math.isnan(grounding.qwenvl_iou("nothing", [5, 5, 5, 5], 10, 10))
    units = metric("grounding", "qwenvl").units(
        [Prediction("1", "nothing", {"box": [5, 5, 5, 5], "width": 10, "height": 10})]
    )
    assert {name: column.tolist() for name, column in units.columns.items()} == {"iou": [0.0], "right": [0.0]}


@pytest.mark.parametrize(
    ("reply", "overlap"),
    [
        ("[0.05, 0.1, 0.55, 1.1]", 0.5 * 0.9 / (0.5 + 0.5 * 0.9 * 0)),  # parts of the picture, cut off below
        ("(50,100),(550,1000)", 0.9),  # thousandths
        ("[550, 1000, 50, 100]", 0.9),  # turned
        ("[10, 20, 110, 1100]", 180 / 200),  # pixels, for one is over 1000
        ("the box is 1 2 3", 0.0),
    ],
)
def test_vlmevalkit_guesses_the_scale(reply, overlap):
    assert grounding.vlmevalkit_iou(reply, BOX, 200, 200) == pytest.approx(overlap)


def test_dropped_batches():
    assert sum(grounding.kept(64)) == 64
    assert sum(grounding.kept(63)) == 56  # seven ranks have 8, the last 7
    assert sum(grounding.kept(7)) == 0
    assert grounding.kept(5, ranks=2, batch=2) == [True, True, False, True, True]
    assert sum(grounding.kept(10834)) == 8 * 1352  # RefCOCO val: 18 are never looked at


def test_a_broken_reference_is_named():
    with pytest.raises(UserError, match="prediction 'x'.*'box'.*four numbers"):
        metric("grounding").units([Prediction("x", "", {"box": [1, 2], "width": 1, "height": 1})])
