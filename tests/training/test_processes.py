"""Training over two real processes: the losses of one process with as many devices; resumed on fewer devices.

On records of which three in four are text alone: batches have pictures on one process only, or none, and no step may
wait for a picture that another process has. Preferences, too, on pairs of answers of the same kind.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import load
from qwenvl_jax.data.record_batches import BatchRecipe
from qwenvl_jax.hosts import HostsRecipe
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.training.optimizer import OptimizerRecipe
from qwenvl_jax.training.parts import Part, Parts, VisionPart
from qwenvl_jax.training.placement import MeshRecipe
from qwenvl_jax.training.preference import DpoRecipe
from qwenvl_jax.training.recipe import Recipe, RecordsRecipe

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "qwenvl_jax" / "assets" / "pictures" / "word.png"
RUN = """
import faulthandler, sys
faulthandler.dump_traceback_later(240, exit=True)  # a run that hangs says where
sys.path.insert(0, {folder!r})
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
from pathlib import Path
from test_processes import {recipe}
from test_run import small
from qwenvl_jax.training.run import train
if __name__ == "__main__":
    train({recipe}(small(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
"""


def mixed(small: Recipe, file: Path, devices: int, hosts: list[str]) -> Recipe:
    """The small run on the records of the file, on a mesh; hosts: address and index of this process, or nothing."""
    batches = BatchRecipe(max_length=96)  # packed, so that there is one shape to compile
    found = HostsRecipe(coordinator=hosts[0], count=2, index=int(hosts[1])) if hosts else HostsRecipe()
    return dataclasses.replace(
        small,
        auxiliary=None,
        optimizer=OptimizerRecipe(learning_rate=0.003),  # compiles sooner than Muon
        records=RecordsRecipe(files=(str(file),), validation=(str(file),), batches=batches),
        batch_size=8,
        evaluate_every=6,
        evaluate_samples=int(devices > 2),
        mesh=MeshRecipe("fsdp" if devices > 1 else "single"),
        hosts=found,
    )


def preferring(small: Recipe, file: Path, devices: int, hosts: list[str]) -> Recipe:
    """An adapter that learns preferences from the pairs of the file, beside the model in the folder `start` there."""
    recipe = mixed(small, file, devices, hosts)
    return dataclasses.replace(
        recipe,
        start=str(file.with_name("start")),
        dpo=DpoRecipe(beta=1.0),  # a few steps at a tenth of it would move the loss too little to compare
        lora=LoraRecipe(rank=4, dropout=0.0),
        optimizer=OptimizerRecipe(name="adamw", learning_rate=0.01, warmup_steps=0),
        steps=3,
        evaluate_every=3,
        evaluate_samples=0,
    )


def cached(small: Recipe, file: Path, devices: int, hosts: list[str]) -> Recipe:
    """The language model alone is trained; two processes read its pictures' features from a cache, one does not."""
    recipe = mixed(small, file, devices, hosts)
    frozen = Parts(vision=VisionPart(freeze=True), resampler=Part(freeze=True))
    records = dataclasses.replace(recipe.records, cache_features=bool(hosts))
    return dataclasses.replace(recipe, records=records, parts=frozen, steps=3, evaluate_every=3, evaluate_samples=0)


def row(number: int) -> dict:
    """A record; every fourth has a picture."""
    pictures = [{"type": "image", "image": str(PICTURE)}] if number % 4 == 0 else []
    asked = {"role": "user", "content": [*pictures, {"type": "text", "text": f"Say {number}."}]}
    return {"messages": [asked, {"role": "assistant", "content": str(number)}]}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("records") / "mixed.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(48)))
    return file


def start(
    script: Path, output: Path, records: Path, devices: int, *where: str, recipe: str = "mixed"
) -> subprocess.Popen:
    """recipe: the function of this file that makes it."""
    script.write_text(RUN.format(folder=str(Path(__file__).parent), recipe=recipe))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, script, output, records, str(devices), *where]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> list[str]:
    """What each of them said."""
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=300)[0])
            assert process.returncode == 0, said[-1]
    finally:
        for process in processes:
            process.kill()
    return said


def start_two(script: Path, output: Path, records: Path, recipe: str = "mixed") -> list[subprocess.Popen]:
    """The run over two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [start(script, output, records, 4, address, str(index), recipe=recipe) for index in range(2)]


def losses(output: Path, kind: str = "train") -> list[float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, records) -> Path:
    """A run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("one")
    finish(start(folder / "script.py", folder / "run", records, 8))
    return folder / "run"


def test_two_processes_train_as_one(one_process, records, tmp_path):
    said = finish(*start_two(tmp_path / "script.py", tmp_path / "run", records))
    assert losses(tmp_path / "run") == pytest.approx(losses(one_process), rel=1e-5)
    assert (tmp_path / "run" / "model-6" / "model.safetensors").exists()
    assert (tmp_path / "run" / "hosts" / "1" / "log.jsonl").exists()
    assert (one_process / "samples" / "6" / "samples.jsonl").exists()  # answered on a mesh, but not by several hosts
    assert [text.count("no samples are answered") for text in said] == [1, 0]
    reports = [path.relative_to(tmp_path) for path in tmp_path.rglob("report.html")]
    assert reports == [Path("run/report.html")]


@pytest.mark.parametrize("devices", [2, 1])
def test_a_run_goes_on_with_fewer_devices(one_process, records, tmp_path, devices):
    run = tmp_path / "run"
    shutil.copytree(one_process, run)
    for later in ("checkpoints/6", "model-6"):  # as if it had ended after its fourth step
        shutil.rmtree(run / later)
    finish(start(tmp_path / "script.py", run, records, devices))
    assert losses(run) == pytest.approx(losses(one_process), rel=1e-5)


def test_two_processes_learn_preferences_as_one(one_process, tmp_path):
    """The reference of each pair, too, which every process makes and one keeps, is that of one process."""
    (tmp_path / "start").symlink_to(one_process / "model-6")
    pairs = tmp_path / "pairs.jsonl"
    answered = [row(number) | {"rejected": "no, never" if number % 3 else "no"} for number in range(24)]
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in answered))
    script, one, two = tmp_path / "script.py", tmp_path / "one", tmp_path / "two"
    finish(start(script, one, pairs, 8, recipe="preferring"))
    finish(*start_two(script, two, pairs, "preferring"))
    first, *later = losses(one)
    assert first == pytest.approx(np.log(2), abs=1e-5)  # the model is its own reference
    assert min(later) < first - 0.05
    for kind in ("train", "evaluation"):
        assert losses(two, kind) == pytest.approx(losses(one, kind), rel=1e-5)
    np.testing.assert_allclose(np.load(two / "reference.npy"), np.load(one / "reference.npy"), rtol=1e-5)
    assert (two / "adapter-3" / "adapter_model.safetensors").exists()


def test_two_processes_share_a_cache_of_features(tmp_path):
    """Each encodes the pictures of its share of the records; the losses are those of one process without a cache."""
    for number in range(5):
        Image.new("RGB", (28, 28), (50 * number, 100, 150)).save(tmp_path / f"{number}.png")
    rows = [row(number) for number in range(48)]
    for number in range(0, 48, 3):
        picture = {"type": "image", "image": str(tmp_path / f"{number // 3 % 5}.png")}
        rows[number]["messages"][0]["content"] = [picture, {"type": "text", "text": f"Say {number}."}]
    records = tmp_path / "pictures.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script, one, two = tmp_path / "script.py", tmp_path / "one", tmp_path / "two"
    finish(start(script, one, records, 8, recipe="cached"))
    finish(*start_two(script, two, records, "cached"))
    for kind in ("train", "evaluation"):
        assert losses(two, kind) == pytest.approx(losses(one, kind), rel=1e-5)
    files = [path for path in (two / "features").rglob("*") if path.is_file()]
    model = load(two / "model-3")
    pictures = [PICTURE, *(tmp_path / f"{number}.png" for number in range(5))]
    shown = np.stack([model.encode_image(picture) for picture in pictures])
    assert len(files) == len(pictures)
    kept = [np.frombuffer(path.read_bytes(), np.float32).reshape(shown[0].shape) for path in files]
    for features in kept:
        assert np.abs(shown - features).max(axis=(1, 2)).min() < 1e-5
