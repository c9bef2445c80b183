"""The train command on a disk that fills up: one line says where, and the same command goes on once there is room."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.training.log import RunLog

ROOT = Path(__file__).parents[2]

# A disk of one MiB of which $1 bytes are free, for this process and its children alone; then the command twice.
SCRIPT = """
mount -t tmpfs -o size=1m tmpfs "$0" || exit 77
head -c $((1048576 - $1)) /dev/zero > "$0/others"
shift
"$@" 2>&1 > "$0.said"
echo "ended with $?"
rm "$0/others"
exec "$@" 2>&1
"""


def train_twice(disk: Path, free: int, command: list[str]) -> tuple[str, str]:
    """What the command says on stderr, ending with 2, when `free` bytes are left; and all that it says with more."""
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", SCRIPT, disk, str(free), *command],
            cwd=ROOT, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare here, to mount a small disk with")
    if done.returncode in (1, 77) and "ended with" not in done.stdout:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout
    full, _, roomy = done.stdout.partition("ended with ")
    assert roomy.startswith("2\n")
    return full, roomy


@pytest.mark.long
@pytest.mark.parametrize(
    ("free", "where", "goes_on"),
    [
        pytest.param(0, "", False, id="the recipe"),
        pytest.param(12 << 10, "", False, id="the log"),
        pytest.param(300 << 10, "/checkpoints", True, id="the second checkpoint"),
    ],
)
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(tmp_path, free, where, goes_on):
    asked = {"from": "user", "value": "How many?"}
    rows = [{"conversations": [asked, {"from": "assistant", "value": f"{n} of them"}]} for n in range(8)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    disk = tmp_path / "disk"
    disk.mkdir()
    full, roomy = train_twice(
        disk, free,
        [
            sys.executable, "train.py", "configs/lora.yaml", "--start", "tiny", "--output", f"{disk}/run",
            "--records.files", f"{tmp_path}/mine.json", "--records.batches.max-length", "64", "--batch-size", "4",
            "--accumulate", "1", "--dtype", "float32", "--remat", "none", "--mesh.preset", "single", "--lora.rank", "1",
            "--steps", "4", "--log-every", "1", "--save-every", "2", "--evaluate-every", "9",
        ],
    )  # fmt: skip
    lines = full.splitlines()
    if goes_on:  # the threads of TensorStore, writing for Orbax, often complain that nobody listens any longer
        lines = [line for line in lines if line.startswith("train: ")]
    assert len(lines) == 1, full
    (message,) = lines
    assert message.startswith(f"train: {disk}/run{where}: ")
    assert "No space left on device" in message
    assert "make room, and the same command goes on" in message
    assert ("(2 done)" in roomy) == goes_on
    assert f"model written to {disk}/run/adapter-4" in roomy.splitlines()


def test_a_log_that_cannot_be_written_anew_is_kept(tmp_path):
    """A run that goes on drops what it logged after its checkpoint; on a full disk it must not lose the rest."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in range(100)))
    before, text = resource.getrlimit(resource.RLIMIT_FSIZE), log.read_text()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            RunLog(tmp_path, steps=100, first=50, params={}, trained=set(), left_out=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.read_text() == text
