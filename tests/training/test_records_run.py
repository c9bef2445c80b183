"""Training on records of one's own, as a user starts it: all of a small model, and an adapter beside the tiny one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwenvl_jax as qv
from qwenvl_jax.training import cli

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "qwenvl_jax" / "assets" / "pictures" / "word.png"


def record(number: int, answer: str) -> dict:
    asked = f"Picture 1: <img>{PICTURE}</img>\nWhich colour has number {number}?"
    return {"conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "animals.json"
    path.write_text(json.dumps([record(number, "purple") for number in range(12)]))
    return path


def train(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.long
def test_an_adapter_beside_quantised_weights_learns(records, tmp_path):
    done = train(
        "configs/lora.yaml", "--start", "tiny", "--quantize", "nf4", "--output", tmp_path / "run",
        "--records.files", records, "--records.batches.max-length", 128, "--records.batches.answers-only",
        "--batch-size", 4, "--accumulate", 2, "--steps", 30, "--log-every", 1, "--dtype", "float32", "--remat", "none",
        "--mesh.preset", "single", "--lora.rank", 8, "--lora.dropout", 0, "--optimizer.learning-rate", 0.005,
        "--optimizer.warmup-share", 0.17,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "run")
    assert found[-1] < 0.2 * found[0]
    base, adapted = qv.load("tiny"), qv.load("tiny", adapter=tmp_path / "run" / "adapter-30", quantize="nf4")
    question = [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)},
                                             {"type": "text", "text": "Which colour has number 5?"}]}]  # fmt: skip
    assert base.chat(question).text != "purple"
    assert adapted.chat(question).text == "purple"


def test_bad_records_are_named_before_the_first_step(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([record(0, "purple"), record(1, "")], indent=0))
    recipe, run = str(ROOT / "configs" / "finetune.yaml"), str(tmp_path / "run")
    flags = ["--start", "tiny", "--records.files", str(path), "--mesh.preset", "single", "--output", run]
    monkeypatch.setattr(sys, "argv", ["train.py", recipe, *flags])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert "bad.json" in error
    assert "1 records cannot be trained on" in error


def test_records_must_be_named(tmp_path, monkeypatch, capsys):
    recipe = str(ROOT / "configs" / "finetune.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", recipe, "--start", "tiny", "--output", str(tmp_path / "run")])
    assert cli.main() == 2
    assert "--records.files" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_and_names_step_and_records(tmp_path):
    asked = {"from": "user", "value": "How many?"}
    conversations = [{"conversations": [asked, {"from": "assistant", "value": f"{n} of them"}]} for n in range(8)]
    (tmp_path / "mine.json").write_text(json.dumps(conversations, indent=0))
    output = tmp_path / "run"
    for attempt in range(2):  # the same command goes on from the checkpoint, and meets it again
        done = train(
            "configs/finetune.yaml", "--start", "tiny", "--output", output, "--records.files", tmp_path / "mine.json",
            "--records.batches.max-length", 64, "--batch-size", 4, "--accumulate", 1, "--dtype", "float32",
            "--remat", "none", "--optimizer.learning-rate", 1e30, "--optimizer.warmup-steps", 0,
            "--steps", 9, "--log-every", 3, "--save-every", 1, "--keep", 1,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        (message,) = done.stderr.strip().splitlines()[-1:]
        assert message.startswith("train: the loss of step 2 is nan; it was made from ")
        assert "mine.json:" in message
        assert message.endswith("the last checkpoint is of step 1")
        assert (output / "checkpoints" / "1").is_dir()
        assert ("(1 done)" in done.stdout) == bool(attempt)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    ends = [row for row in rows if row["kind"] == "end"]
    assert [end["how"] for end in ends] == ["not a number"] * 2
    assert f"train: {ends[1]['message']}" == message
    page = (output / "report.html").read_text()
    assert ends[1]["message"].replace("'", "&#x27;") in page
