"""A run with cached features of its pictures: the losses of a run without, resumed too, and of an adapter."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.data.record_batches import BatchRecipe
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.training.optimizer import OptimizerRecipe
from qwenvl_jax.training.parts import Part, Parts, VisionPart
from qwenvl_jax.training.recipe import NewModel, Recipe, RecordsRecipe
from qwenvl_jax.training.run import train

MODEL = NewModel(
    layers=1, hidden_size=128, heads=2, intermediate_size=32, image_size=16, patch_size=4, vision_width=16,
    vision_layers=1, vision_heads=2, n_queries=4, start_local=False,
)  # fmt: skip
FROZEN = Parts(vision=VisionPart(freeze=True), resampler=Part(freeze=True))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("records")
    rows = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number % 5}.png")
        rows.append({"image": f"{number % 5}.png", "question": "What is this?", "answer": f"a circle {number}"})
    (folder / "mine.json").write_text(json.dumps(rows))
    records = RecordsRecipe(
        files=(str(folder / "mine.json"),), validation=(str(folder / "mine.json"),), batches=BatchRecipe(max_length=96)
    )
    return Recipe(
        new_model=MODEL, records=records, parts=FROZEN, optimizer=OptimizerRecipe(learning_rate=1e-3), steps=4,
        batch_size=2, log_every=1, evaluate_every=4, evaluate_samples=0, save_every=2, keep=2, export_dtype="float32",
    )  # fmt: skip


def run(recipe: Recipe, output: Path, cached: bool) -> list[float]:
    records = dataclasses.replace(recipe.records, cache_features=cached)
    assert train(dataclasses.replace(recipe, output=str(output), records=records)) is not None
    return losses(output)


def losses(output: Path) -> list[float]:
    """Of each step and of the validation at the end."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] in ("train", "evaluation")]


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("plain")
    run(recipe, output, cached=False)
    return output


def test_losses_are_those_of_a_run_without_and_it_resumes(recipe, plain, tmp_path):
    found = run(recipe, tmp_path, cached=True)
    assert len(found) == 5
    np.testing.assert_allclose(found, losses(plain), rtol=1e-6, atol=1e-6)  # the log has six digits
    files = [path for path in (tmp_path / "features").rglob("*") if path.is_file()]
    assert len(files) == 5
    times = {path: path.stat().st_mtime_ns for path in files}
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "model-4")
    assert run(recipe, tmp_path, cached=True) == found
    assert {path: path.stat().st_mtime_ns for path in files} == times


@pytest.mark.long
def test_an_adapter_learns_from_cached_features(recipe, plain, tmp_path):
    lora = LoraRecipe(rank=2, dropout=0)
    adapter = dataclasses.replace(recipe, start=str(plain / "model-4"), lora=lora, parts=Parts())
    expected = run(adapter, tmp_path / "plain", cached=False)
    assert expected[-1] != expected[0]
    np.testing.assert_allclose(
        run(adapter, tmp_path / "cached", cached=True), expected, rtol=1e-6, atol=1e-6
    )  # the log has six digits


def test_a_tower_that_learns_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"vision tower is trained \(model.visual.*parts.resampler.freeze"):
        run(dataclasses.replace(recipe, parts=Parts(vision=VisionPart(freeze=True))), tmp_path, cached=True)
