"""A real run of a small recipe: it trains, is killed, resumes where it was, and exports a model that loads."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import UserError
from qwenvl_jax.data.packing import RowShape
from qwenvl_jax.data.scene_rows import SceneRecipe
from qwenvl_jax.training.optimizer import OptimizerRecipe
from qwenvl_jax.training.recipe import AuxiliaryRecipe, NewModel, Recipe
from qwenvl_jax.training.run import train

ROOT = Path(__file__).parents[2]


def small(output: Path) -> Recipe:
    model = NewModel(
        layers=1,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        n_queries=4,
    )
    data = SceneRecipe(
        row=RowShape(prefix=32, blocks=2, block=64, targets=64),
        pair_row=RowShape(prefix=64, blocks=1, block=64, targets=48),
        two_pictures_every=3,
    )
    return Recipe(
        output=str(output),
        new_model=model,
        data=data,
        optimizer=OptimizerRecipe(name="muon", learning_rate=0.01, warmup_steps=1),
        auxiliary=AuxiliaryRecipe(alone_steps=1),
        steps=6,
        batch_size=2,
        log_every=1,
        evaluate_every=6,
        evaluate_batches=1,
        save_every=2,
        export_dtype="float32",
    )


RUN = """
import sys
sys.path.insert(0, {folder!r})
from test_run import small
from qwenvl_jax.training.run import train
if __name__ == "__main__":
    train(small(sys.argv[1]))
"""


def train_until_killed(output: Path, checkpoint: int, script: Path) -> None:
    """Starts the run in a process of its own and kills it (SIGKILL) once it has saved `checkpoint`."""
    script.write_text(RUN.format(folder=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, str(script), str(output)], cwd=ROOT, start_new_session=True)
    saved = output / "checkpoints" / str(checkpoint) / "_CHECKPOINT_METADATA"
    deadline = time.monotonic() + 240
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert saved.exists()


def logged(output: Path) -> list[tuple[int, float, float]]:
    """(step, trained tokens, loss) of each logged step."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["target_tokens"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    train(small(output))
    return output


def test_a_killed_run_resumes_where_it_was(undisturbed, tmp_path):
    """The same batches in the same order, and the same numbers but for the order in which threads add them up."""
    train_until_killed(tmp_path / "run", 2, tmp_path / "script.py")
    assert not (tmp_path / "run" / "model-6").exists()
    train(small(tmp_path / "run"))
    expected = load_file(undisturbed / "model-6" / "model.safetensors")
    found = load_file(tmp_path / "run" / "model-6" / "model.safetensors")
    assert expected.keys() == found.keys()
    # A bias on keys shifts all scores of a query alike: its gradient is rounding, which Adam blows up to full size.
    moved_by_noise = ("in_proj_bias", "in_proj.bias", "c_attn.bias")
    for name in (name for name in expected if not name.endswith(moved_by_noise)):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
    assert [row[:2] for row in logged(tmp_path / "run")] == [row[:2] for row in logged(undisturbed)]
    np.testing.assert_allclose(
        [row[2] for row in logged(tmp_path / "run")], [row[2] for row in logged(undisturbed)], rtol=1e-5
    )


def test_the_export_loads_and_the_run_leaves_its_record(undisturbed):
    model = load_model(undisturbed / "model-6")
    assert model.config.hidden_size == 128
    assert {path.name for path in undisturbed.iterdir()} >= {"recipe.yaml", "log.jsonl", "curve.png", "tensorboard"}
    assert (undisturbed / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _, _ in logged(undisturbed)] == [1, 2, 3, 4, 5, 6]


def test_the_loss_falls(undisturbed):
    losses = [loss for _, _, loss in logged(undisturbed)]
    assert losses[-1] < losses[1] - 0.5  # the first step is the vision tower's alone


def test_another_recipe_does_not_continue_a_run(undisturbed):
    with pytest.raises(UserError, match="another recipe"):
        train(dataclasses.replace(small(undisturbed), seed=1))
