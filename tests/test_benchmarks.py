"""Benchmarks that need no torch run to their end and write their numbers. How good those are is not asked here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run(script: str, *options: str) -> str:
    command = [sys.executable, f"benchmarks/{script}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prefill_is_held_against_its_work(tmp_path):
    """FLOPs are 2 for each parameter that a token meets; attention and the head for one token are the small rest."""
    shown = run("prefill.py", "--lengths", "50", "80", "--repetitions", "1", "--output", str(tmp_path / "found"))
    found = json.loads((tmp_path / "found.json").read_text())
    timed = {(one["what"], one["tokens"]) for one in found["seconds"]}
    assert timed == {("encode", 1), ("picture", 80), *((what, n) for what in ("prefill", "text") for n in (50, 80))}
    assert found["padded"] == {"50": 64, "80": 128}
    assert "80 tokens" in shown
    assert (tmp_path / "found.png").stat().st_size > 0
    flops, size = found["work"]["50"]["text"]
    layers, head = 4 * (4 * 128**2 + 3 * 128 * 384), 128 * 1024
    assert flops == pytest.approx(2 * 50 * layers + 2 * head + 4 * (4 * 128) * 50 * 51 / 2)
    assert size / 4 == pytest.approx(layers + head + 50 * (128 + 2 * 4 * 128), rel=0.01)  # float32; norms and biases


def test_the_hosts_share_has_its_parts(tmp_path):
    run("host_share.py", "--slots", "2", "--tokens", "120", "--rounds", "1", "--output", str(tmp_path / "found.json"))
    (found,) = json.loads((tmp_path / "found.json").read_text())["rounds"]
    assert found["worked"] == pytest.approx(found["calls"] + found["rest"])
    assert found["held_up"] == pytest.approx(found["whole"] - found["bare"])
    assert min(found["calls"], found["rest"], found["bare"]) > 0
    assert found["turns"] >= 3


def test_an_evaluation_is_held_against_asking_one_by_one(tmp_path):
    run("evaluation.py", "--samples", "12", "--rounds", "2", "--output", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["side"] for one in found["rounds"]] == ["one by one", "runner"] * 2
    assert found["different"] == 0
    first, second = found["rounds"][:2]
    assert found["ratio"][0] == pytest.approx(first["seconds"] / second["seconds"])
