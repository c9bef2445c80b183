"""A real run of a small recipe: it trains, is killed, resumes where it was, and exports a model that loads."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenvl_jax import convert
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import UserError
from qwenvl_jax.data.packing import RowShape
from qwenvl_jax.data.scene_rows import SceneRecipe
from qwenvl_jax.evaluation.metrics import registry as metrics
from qwenvl_jax.evaluation.predictions import read_predictions
from qwenvl_jax.evaluation.scores import score
from qwenvl_jax.training import cli
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
        optimizer=OptimizerRecipe(learning_rate=0.01, warmup_steps=1),
        auxiliary=AuxiliaryRecipe(alone_steps=1),
        steps=6,
        batch_size=2,
        log_every=1,
        evaluate_every=3,
        evaluate_batches=1,
        evaluate_samples=2,
        save_every=2,
        export_dtype="float32",
    )


RUN = """
import dataclasses, sys
sys.path.insert(0, {folder!r})
from test_run import small
from qwenvl_jax.training.recipe import TasksRecipe
from qwenvl_jax.training.run import train
if __name__ == "__main__":
    samples = int(sys.argv[2])
    tasks = TasksRecipe(tasks=("scenes",) if samples else (), limit=6)
    train(dataclasses.replace(small(sys.argv[1]), evaluate_samples=samples, evaluate=tasks))
"""


def start(output: Path, script: Path, samples: int = 0) -> subprocess.Popen:
    """The run in a process of its own, as users run it; the eight devices of this one share threads otherwise."""
    script.write_text(RUN.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, str(script), str(output), str(samples)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def train_until_killed(output: Path, checkpoint: int, script: Path) -> None:
    """Starts the run and kills it (SIGKILL) once it has saved `checkpoint`."""
    process = start(output, script)
    saved = output / "checkpoints" / str(checkpoint) / "_CHECKPOINT_METADATA"
    deadline = time.monotonic() + 240
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert saved.exists()


def logged(output: Path) -> list[dict]:
    """The logged values of each step, without times."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    times = re.compile("time|mfu|memory|seconds|data_wait|.*_per_second")
    return [{k: v for k, v in row.items() if not times.match(k)} for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A whole run that also answers samples and a task half-way; the others do not, and must train the same."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder / "run", folder / "script.py", samples=2).wait() == 0
    return folder / "run"


def test_a_killed_run_resumes_bit_for_bit(undisturbed, tmp_path):
    run = tmp_path / "run"
    train_until_killed(run, 2, tmp_path / "script.py")
    assert not (run / "model-6").exists()
    assert start(run, tmp_path / "script.py").wait() == 0
    assert re.findall("<td>(killed|finished)", (run / "report.html").read_text()) == ["killed", "finished"]
    weights = Path("model-6") / "model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert logged(run) == logged(undisturbed)


@pytest.mark.long
def test_sigterm_saves_and_ends_well(undisturbed, tmp_path):
    """What a cluster sends before it takes a machine away; here once the first step is done, between checkpoints."""
    run = tmp_path / "run"
    process = start(run, tmp_path / "script.py")
    log = run / "log.jsonl"
    deadline = time.monotonic() + 240
    while (
        process.poll() is None and time.monotonic() < deadline and not (log.exists() and '"train"' in log.read_text())
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert saved
    assert [row["step"] for row in logged(run)] == list(range(1, saved[-1] + 1))
    assert start(run, tmp_path / "script.py").wait() == 0
    assert logged(run) == logged(undisturbed)


def test_the_export_loads_and_the_run_leaves_its_record(undisturbed):
    model = load_model(undisturbed / "model-6")
    assert model.config.hidden_size == 128
    kept = {path.name for path in undisturbed.iterdir()}
    assert kept >= {"recipe.yaml", "log.jsonl", "curve.png", "report.html", "samples", "tensorboard"}
    assert (undisturbed / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in logged(undisturbed)] == [1, 2, 3, 4, 5, 6]
    for step in (3, 6):
        lines = (undisturbed / "samples" / str(step) / "samples.jsonl").read_text().splitlines()
        assert [set(json.loads(line)) >= {"question", "expected", "answer", "picture"} for line in lines] == [True] * 2
    page = (undisturbed / "report.html").read_text()
    assert "All steps are done" in page
    assert page.count("<img ") == 2


def test_the_tasks_of_a_recipe_are_answered_at_each_evaluation(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluated] == [3, 6]
    for row in evaluated:
        file = undisturbed / "evaluation" / str(row["step"]) / "scenes.jsonl"
        manifest, found = read_predictions(file)
        assert (manifest["step"], len(found), {one.error for one in found}) == (row["step"], 6, {None})
        assert all((file.parent / name).is_file() for one in found for name in one.pictures)
        assert row["scenes/accuracy"] == pytest.approx(score(found, metrics.metric("scenes")).headline.value, rel=1e-5)
    assert len(list((undisturbed / "evaluation" / "scenes.pictures").iterdir())) < 6  # each is kept once
    assert "Scenes: accuracy, validation" in (undisturbed / "report.html").read_text()


def test_a_row_of_the_log_says_how_fast_and_how_full(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["records"] for row in trained] == [2, 4, 6, 8, 10, 12]
    assert [row["pictures"] for row in trained] == [2, 2, 4, 2, 2, 4]  # every third step is about pairs
    vision, *whole = trained
    assert vision["tokens"] == 0  # the language model waits
    for row in whole:
        assert 32 < row["tokens"] < 2 * 160
        assert 0 < row["padding"] < 0.9
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds_per_step"], rel=1e-4)
        assert 0 <= row["data_wait_share"] <= 1
        assert "mfu" not in row  # of a CPU no peak is known
    assert trained[-1]["seconds_left"] == 0
    assert [row["kind"] for row in rows if row["kind"] in ("start", "end")] == ["start", "end"]


def test_a_checkpoint_is_exported_without_the_optimizer(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "6" / "optimizer")
    assert convert.main([str(run / "checkpoints" / "6"), str(tmp_path / "model")]) == 0
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (undisturbed / "model-6" / weights).read_bytes()
    shutil.rmtree(run / "checkpoints" / "6" / "params")
    assert convert.main([str(run / "checkpoints" / "6"), str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_ends_in_one_line(undisturbed, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    files = [path for path in (run / "checkpoints" / "6" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    monkeypatch.setattr(sys, "argv", ["train.py", str(run / "recipe.yaml"), "--output", str(run)])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train: {run / 'checkpoints' / '6'}: damaged")
    assert "remove it" in error
    assert error.count("\n") == 1
    assert largest.exists()


def test_the_loss_falls(undisturbed):
    losses = [row["loss"] for row in logged(undisturbed)]
    assert losses[-1] < losses[1] - 0.5  # the first step is the vision tower's alone


def test_another_recipe_does_not_continue_a_run(undisturbed):
    with pytest.raises(UserError, match="another recipe"):
        train(dataclasses.replace(small(undisturbed), seed=1))


def test_a_loss_that_is_no_number_at_the_first_step_ends_the_run(tmp_path):
    """A later one is in test_records_run.py."""
    recipe = dataclasses.replace(small(tmp_path), auxiliary=None, save_every=1, evaluate_every=4, evaluate_samples=0)
    model = dataclasses.replace(recipe.new_model, initializer_range=1e30)
    recipe = dataclasses.replace(recipe, new_model=model, optimizer=OptimizerRecipe(learning_rate=0.01))
    with pytest.raises(FloatingPointError, match=r"of step 1 is .*train scenes of rows .*; no checkpoint was saved"):
        train(recipe)
    assert logged(tmp_path) == []
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["how"] == "not a number"
    assert "of step 1 is" in (tmp_path / "report.html").read_text()
