"""Published scores: every row is complete, has a source, and is the number that the source has."""

import json
import math
import re

import pytest

from qwenvl_jax.evaluation.published import FILE, published, published_for, tasks

KEPT = json.loads(FILE.read_text(encoding="utf-8"))
FIELDS = {"task": str, "score": str, "model": str, "value": (int, float), "source": str, "verified": bool, "note": str}
FAMILY = re.compile(r"Qwen-VL(-Chat(-1\.1)?)?|Qwen2(\.5)?-VL-\dB|Qwen3-VL-\dB-(Instruct|Thinking)")


def test_every_row_is_well_formed():
    for row in KEPT["scores"]:
        assert row.keys() <= FIELDS.keys()
        assert {"task", "model", "value", "source"} <= row.keys()
        assert all(isinstance(value, FIELDS[name]) for name, value in row.items()), row
        assert re.fullmatch(r"[a-z0-9_+]+(A|B)?", row["task"]), row
        assert FAMILY.fullmatch(row["model"]), row
        assert 0 < row["value"] < 2800
        assert row["source"] in KEPT["sources"]


def test_nothing_is_said_twice():
    keys = [(row["task"], row.get("score", ""), row["model"]) for row in KEPT["scores"]]
    assert len(keys) == len(set(keys))
    assert {row["source"] for row in KEPT["scores"]} == set(KEPT["sources"])


def test_what_a_third_party_measured_is_not_verified():
    assert all(not row.verified for task in tasks() for row in published(task) if "third party" in row.note)


@pytest.mark.parametrize(
    ("task", "model", "value"),
    [
        ("flickr", "Qwen-VL", 85.8),
        ("vqav2_testdev", "Qwen-VL-Chat", 78.2),
        ("refcocog_test", "Qwen-VL-Chat", 86.32),
        ("refcoco+_testB", "Qwen-VL", 77.21),
        ("ocrbench", "Qwen3-VL-8B-Instruct", 896),
        ("mme", "Qwen2.5-VL-7B", 2347),
    ],
)
def test_some_that_are_well_known(task, model, value):
    (row,) = (row for row in published_for(task, "", headline=True) if row.model == model)
    assert row.value == value
    assert row.where
    assert row.verified


def test_mme_adds_up():
    """As it does in the source: the sums are of the unrounded parts, 14 of them."""
    parts = {row.score: row.value for row in published("mme") if row.score}
    total = next(row.value for row in published("mme") if not row.score and row.model == "Qwen-VL-Chat")
    sums = {name: parts.pop(name) for name in ("perception", "cognition")}
    assert len(parts) == 14
    assert math.isclose(sum(parts.values()), total, abs_tol=0.005 * 15)
    assert math.isclose(sum(sums.values()), total, abs_tol=0.01)


def test_a_split_without_a_score_has_that_of_its_neighbour():
    assert {row.task for row in published("docvqa_val")} == {"docvqa_test"}
    assert published("no_such_task") == ()
    assert all(neighbour in tasks() and task not in tasks() for task, neighbour in KEPT["near"].items())


def test_sub_scores_are_found_by_name():
    (row,) = published_for("mme", "ocr", headline=False)
    assert row.value == 140
    assert published_for("mme", "", headline=False) == ()
