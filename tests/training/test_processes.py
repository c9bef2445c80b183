"""Training over two real processes: the losses of one process with as many devices; resumed on fewer devices.

On records of which three in four are text alone: batches have pictures on one process only, or none, and no step may
wait for a picture that another process has.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.data.record_batches import BatchRecipe
from qwenvl_jax.training.hosts import HostsRecipe
from qwenvl_jax.training.optimizer import OptimizerRecipe
from qwenvl_jax.training.placement import MeshRecipe
from qwenvl_jax.training.recipe import Recipe, RecordsRecipe

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "qwenvl_jax" / "assets" / "pictures" / "word.png"
RUN = """
import sys
sys.path.insert(0, {folder!r})
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
from pathlib import Path
from test_processes import mixed
from test_run import small
from qwenvl_jax.training.run import train
if __name__ == "__main__":
    train(mixed(small(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
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


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A quarter of them has a picture."""

    def row(number: int) -> dict:
        pictures = [{"type": "image", "image": str(PICTURE)}] if number % 4 == 0 else []
        asked = {"role": "user", "content": [*pictures, {"type": "text", "text": f"Say {number}."}]}
        return {"messages": [asked, {"role": "assistant", "content": str(number)}]}

    file = tmp_path_factory.mktemp("records") / "mixed.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(48)))
    return file


def start(script: Path, output: Path, records: Path, devices: int, *where: str) -> subprocess.Popen:
    script.write_text(RUN.format(folder=str(Path(__file__).parent)))
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


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, records) -> Path:
    """A run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("one")
    finish(start(folder / "script.py", folder / "run", records, 8))
    return folder / "run"


def test_two_processes_train_as_one(one_process, records, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = tmp_path / "script.py"
    said = finish(*(start(script, tmp_path / "run", records, 4, address, str(index)) for index in range(2)))
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
