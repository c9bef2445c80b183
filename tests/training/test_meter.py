"""The numbers of a row of the log: counted on the device, as the data counts them; and what stops a run."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.record_batches import BatchRecipe, RecordBatches
from qwenvl_jax.data.records import Record
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.flops import StepCost
from qwenvl_jax.training.meter import Meter, count
from qwenvl_jax.training.recipe import NewModel

QUERIES = 4


@pytest.fixture(scope="module")
def batches() -> RecordBatches:
    tokenizer = Tokenizer.from_file("qwenvl_jax/assets/tiny/qwen.tiktoken", QUERIES)
    shape = NewModel(image_size=16, patch_size=8, n_queries=QUERIES)

    def record(number: int) -> Record:
        shown = [{"type": "image", "image": Image.new("RGB", (9, 9))}] * (number % 3)
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": "how many? " * number}]}
        return Record([asked, {"role": "assistant", "content": str(number)}], f"memory:{number}")

    mixture = Mixture([[record(number) for number in range(9)]])
    processor = Processor(tokenizer, shape.config(tokenizer.image_start_id))
    return RecordBatches(BatchRecipe(max_length=128), mixture, processor, rows=2, epochs=2)


def test_the_device_counts_what_the_data_counts(batches):
    assert len(batches) > 2
    for number in range(len(batches)):
        expected, batch = batches.counts(number), batches[number]
        found = count({name: value[None] for name, value in batch.items()}, queries=QUERIES)
        assert found["tokens"] == expected["tokens"]
        assert found["pictures"] == found["encoded"] == expected["pictures"]
        assert 1 - found["tokens"] / found["places"] == pytest.approx(expected["padding"])
        assert 1 - found["pictures"] / found["picture_places"] == pytest.approx(expected["picture_padding"])
        lengths = [np.sum(row == group) for row in batch["group"] for group in range(1, row.max() + 1)]
        assert found["pairs"] == sum(n * (n + 1) / 2 for n in lengths)
        assert batches.before(number + 1) - batches.before(number) == expected["records"]


def test_pictures_from_a_cache_are_not_encoded(batches):
    batch = {name: value[None] for name, value in batches[0].items()}
    batch["features"] = np.zeros((*batch.pop("pixels").shape[:2], QUERIES, 8), np.float32)
    found = count(batch, queries=QUERIES)
    assert found["pictures"] > 0
    assert found["encoded"] == 0


def test_records_that_lose_text_are_named(batches):
    short = RecordBatches(
        dataclasses.replace(batches.recipe, max_length=40),
        Mixture(batches.source.sources),
        batches.processor,
        2,
        epochs=1,
    )
    named = list(short.shortened)
    assert len(named) == short.cut > 0
    assert named[0].startswith("memory:")


def metrics(**values: float) -> dict:
    counts = {"tokens": 30.0, "places": 40.0, "pairs": 100.0, "pictures": 0.0, "picture_places": 0.0, "encoded": 0.0}
    usual = counts | {"loss": 2.0, "gradient_norm": 1.0, "target_tokens": 10.0}
    return {name: jnp.float32(value) for name, value in (usual | values).items()}


def test_a_row_has_means_speeds_and_whatever_else_a_step_tells():
    meter = Meter(StepCost(token=5.0, pair=1.0, target=3.0, picture=7.0), peak=1e6)
    meter.add(metrics(reward=1.0), waited=0.01)
    meter.add(metrics(reward=2.0, loss=4.0), waited=0.03)
    with meter.paused():
        time.sleep(0.5)
    row = meter.row()
    assert row["loss"] == 3
    assert row["reward"] == 1.5
    assert row["padding"] == pytest.approx(0.25)
    assert "picture_padding" not in row  # there are no places for pictures
    assert "pairs" not in row
    assert row["data_wait"] == pytest.approx(0.02)
    seconds = row["seconds_per_step"]
    assert seconds < 0.2  # the pause is no part of it
    assert row["tokens_per_second"] == pytest.approx(30 / seconds)
    assert row["mfu"] == pytest.approx((5 * 30 + 100 + 3 * 10) / seconds / 1e6)
    assert meter.metrics == []


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_what_is_no_number_is_named_with_its_step_and_records(name):
    meter = Meter(StepCost(1, 1, 1, 1), None)
    meter.add(metrics(), 0.0)
    meter.check(7, lambda step: [], None)
    meter.add(metrics(**{name: float("nan")}), 0.0)
    meter.add(metrics(**{name: float("nan")}), 0.0)
    with pytest.raises(FloatingPointError, match=r"of step 8 is nan; it was made from mine.json:8; .* of step 5"):
        meter.check(9, lambda step: [f"mine.json:{step}"], 5)
