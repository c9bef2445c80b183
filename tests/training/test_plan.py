"""Plans: what a step needs is told from shapes alone, by the step that a run compiles."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.data.record_batches import BatchRecipe
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.training import cli, planned_devices
from qwenvl_jax.training.placement import MeshRecipe
from qwenvl_jax.training.plan import (
    GIB,
    LITTLE_EFFORT,
    Plan,
    _known,
    _needed,
    abstract_step,
    bytes_on_a_device,
    plan,
    report,
)
from qwenvl_jax.training.planned_devices import PlanRecipe, topology
from qwenvl_jax.training.preference import DpoRecipe
from qwenvl_jax.training.recipe import Recipe, RecordsRecipe, parse_plan

ROOT = Path(__file__).parents[2]
LENGTH, DIM, MLP = 96, 256, 512  # tokens of a row, D, F


@pytest.fixture(scope="module", autouse=True)
def compiled_for_cpus():
    """Also where the compiler for TPUs is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned_devices.importlib.util, "find_spec", lambda name: None)
        yield


def folder(path: Path, layers: int) -> str:
    """A checkpoint folder that has a configuration and nothing else."""
    visual = VisionConfig(
        image_size=28, patch_size=14, width=32, layers=1, heads=2, mlp_ratio=2.0, output_dim=DIM, n_queries=4,
        image_start_id=90,
    )  # fmt: skip
    config = QwenVLConfig(
        vocab_size=128, hidden_size=DIM, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * MLP,
        visual=visual,
    )  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    return str(path)


def recipe(start: str, **changes) -> Recipe:
    records = RecordsRecipe(batches=BatchRecipe(max_length=LENGTH))
    plain = Recipe(start=start, records=records, batch_size=8, dtype="bfloat16", remat="layers")
    return dataclasses.replace(plain, **changes)


ADAPTER = LoraRecipe(rank=2)


def test_parts_are_what_the_arrays_take(tmp_path):
    """A model of nine layers, sharded over eight devices: counted here by hand."""
    whole = recipe(folder(tmp_path / "model", 9), mesh=MeshRecipe("fsdp"))
    found = plan(whole, PlanRecipe(devices=8))
    _, (state, frozen, batch) = abstract_step(whole, jax.devices()[:8], 1)
    count = sum(math.prod(value.shape) for value in state.params.values())
    assert not frozen
    assert found.frozen == 0
    layers = 9 * (4 * DIM**2 + 3 * DIM * MLP + 3 * DIM + 2 * DIM)
    assert count > layers + 2 * 128 * DIM
    split = 9 * (4 * DIM**2 + 3 * DIM * MLP) + 2 * 128 * DIM  # float32, an eighth each
    assert 4 * split / 8 < found.trained < 4 * split / 8 + 4 * (count - split)
    assert found.optimizer == pytest.approx(2 * found.trained, abs=64)
    pixels = 3 * 28 * 28 * 4
    assert found.batch == 6 * LENGTH * 4 + pixels  # one row and one picture on each device
    assert batch["ids"].shape == (1, 8, LENGTH)
    assert found.peak == sum(
        getattr(found, name) for name in ("trained", "frozen", "optimizer", "batch", "temporaries")
    )


def test_fsdp_fetches_weights_and_never_the_batch(tmp_path):
    """No device computes a layer for all rows, of which it would hold parts of the products."""
    whole = recipe(folder(tmp_path / "model", 9), mesh=MeshRecipe("fsdp"))
    step, arguments = abstract_step(whole, jax.devices()[:8], 1)
    text = step.lower(*arguments).compile(compiler_options=LITTLE_EFFORT).as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"(?:f32|bf16)\[(\d+(?:,\d+)+)\]", text)}
    assert any(shape[-2:] == (DIM, MLP) for shape in shapes)  # a layer's whole matrix, gathered for use
    tokens = 8 * LENGTH
    of_all_rows = [shape for shape in shapes if shape[0] == tokens or shape[:2] == (8, LENGTH)]
    assert of_all_rows  # embeddings are looked up for all
    assert max(map(math.prod, of_all_rows)) <= tokens * DIM


@pytest.mark.long
def test_qlora_keeps_no_widened_layer(tmp_path):
    """Eight more layers cost the step less than their weights in a wider form, though it keeps all else for the
    backward pass.
    """
    temporaries = []
    for layers in (9, 17):
        start = folder(tmp_path / str(layers), layers)
        short = RecordsRecipe(batches=BatchRecipe(max_length=16))
        quantised = recipe(start, lora=ADAPTER, quantize="nf4", batch_size=1, remat="none", records=short)
        temporaries.append(plan(quantised, PlanRecipe()).temporaries)
    widened = 2 * (4 * DIM**2 + 3 * DIM * MLP)  # of a layer, in bfloat16
    assert (temporaries[1] - temporaries[0]) / 8 < widened / 2


def test_a_checkpoint_that_is_not_there_is_planned():
    """The released model from its name alone: 9.6B parameters, the language model's maps in four bits."""
    start = "Qwen/Qwen-VL-Chat"
    quantised = dataclasses.replace(recipe(start, lora=LoraRecipe()), quantize="nf4")
    _, (state, frozen, _) = abstract_step(_known(quantised), jax.devices()[:1], 1)
    maps = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    others = 9_656_935_168 - maps
    assert 0.5 * maps + 2 * others < bytes_on_a_device(frozen) < 0.53 * maps + 2 * others
    assert sum(math.prod(value.shape) for value in state.params.values()) == 32 * 64 * (
        4096 + 3 * 4096 + 4096 + 4096 + 2 * (4096 + 11008)
    )
    with pytest.raises(UserError, match="Qwen/Qwen-VL, Qwen/Qwen-VL-Chat, Qwen/Qwen-VL-Chat-Int4"):
        plan(recipe("Qwen/Qwen-7B"), PlanRecipe())


def test_a_recipe_without_a_start_draws_its_batch(tmp_path):
    _, (state, _, batch) = abstract_step(Recipe(batch_size=4, accumulate=2), jax.devices()[:1], 1)
    assert batch["pixels"].shape == (2, 2, 3, 96, 96)
    assert state.params["model.embedding.table"].shape == (1024, 128)


def test_preference_runs_and_cached_features_have_batches_of_their_own(tmp_path):
    records = RecordsRecipe(batches=BatchRecipe(max_length=LENGTH), cache_features=True)
    start = folder(tmp_path / "model", 1)
    for changes, name in (({"dpo": DpoRecipe()}, "reference"), ({"records": records}, "features")):
        step, arguments = abstract_step(recipe(start, lora=ADAPTER, **changes), jax.devices()[:1], 1)
        assert name in arguments[2]
        step.lower(*arguments)  # the step reads all of it, and nothing else


def test_the_verdict_and_what_would_help():
    full = dataclasses.replace(recipe("tiny"), remat="none", batch_size=16)
    sizes = {"trained": 40 * GIB, "frozen": 0, "optimizer": 80 * GIB, "batch": 0, "temporaries": 10 * GIB}
    needs = Plan(**sizes, sequences=16, compiler="a compiler")
    text, fits = report(full, PlanRecipe(device="100"), needs)
    assert not fits
    assert "does not fit: 35.0 GiB too much" in text
    for flag in ("--remat layers", "--accumulate 16", "--optimizer.name adafactor", "--mesh.preset fsdp"):
        assert flag in text
    text, fits = report(full, PlanRecipe(device="h200"), needs)
    assert fits
    assert "try" not in text
    adapter = dataclasses.replace(full, lora=ADAPTER, remat="layers", batch_size=1)
    needs = dataclasses.replace(needs, trained=GIB, optimizer=2 * GIB, frozen=18 * GIB, sequences=1)
    assert "--quantize nf4" in report(adapter, PlanRecipe(device="rtx4090"), needs)[0]


@pytest.mark.parametrize(
    ("message", "bytes_needed"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded", int(20.5 * GIB)),
        ("the total memory required for HLO temporaries (512.00M) exceeds available HBM (95.74G)", GIB // 2),
    ],
)
def test_a_program_that_does_not_fit_says_what_it_needs(message, bytes_needed):
    assert _needed(message) == bytes_needed
    with pytest.raises(UserError, match="does not compile: another"):
        _needed("another\nerror")


def test_flags():
    assert parse_plan(["r.yaml", "--steps", "3"]) == (["r.yaml", "--steps", "3"], None)
    rest, options = parse_plan(["r.yaml", "--plan.devices", "8", "--plan", "--steps", "3", "--plan.device=v5e"])
    assert rest == ["r.yaml", "--steps", "3"]
    assert options == PlanRecipe(devices=8, device="v5e")
    with pytest.raises(UserError, match="did you mean h100"):
        PlanRecipe(device="h10")


def test_a_device_that_is_not_known_is_a_mistake(monkeypatch, capsys, tmp_path):
    flags = ["--output", str(tmp_path / "run"), "--plan.device", "much"]
    monkeypatch.setattr(sys, "argv", ["train.py", str(ROOT / "configs" / "tiny.yaml"), *flags])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert "plan.device is 'much'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_slices():
    assert [topology(count, 2) for count in (1, 4, 8, 64)] == [(1, 1), (2, 2), (4, 2), (8, 8)]
    assert [topology(count, 3) for count in (4, 8, 64)] == [(2, 2, 1), (2, 2, 2), (4, 4, 4)]


@pytest.mark.parametrize(("gibibytes", "status"), [("1", 0), ("0.01", 1)])
def test_the_command(tmp_path, gibibytes, status):
    """For 16 devices, more than this process has; nothing is written."""
    flags = (
        "--new-model.layers 1 --new-model.vision-layers 1 --mesh.preset fsdp --optimizer.name adamw --plan.devices 16"
    )
    where = ["--output", str(tmp_path / "run"), "--plan.device", gibibytes]
    command = [sys.executable, "train.py", "configs/tiny.yaml", *flags.split(), *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
    assert ("does not fit" in done.stdout) == (status == 1)
