"""A dataset evaluated through a real server: all is well, a request is refused, the server goes, and mistakes."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from serving.process import ServerProcess

from qwenvl_jax.evaluation import served_model
from qwenvl_jax.evaluation.command import main
from qwenvl_jax.evaluation.miniature import draw
from qwenvl_jax.evaluation.predictions import read_predictions

REPOSITORY = Path(__file__).parents[2]
SAMPLES = 8
KEY = "sk-test-0123456789"
pytestmark = pytest.mark.usefixtures("no_proxy")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature") / "data"
    draw(folder, samples=SAMPLES)
    return folder


def ask(data: Path, output: Path, base: str, *more: str, name: str = "textvqa_val") -> int:
    where = ["--dataset", name, "--data", str(data), "--output", str(output), "--api-base", base]
    return main("vqa", [*where, *more])


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_the_script_asks_a_server_and_scores_what_it_says(server, data, tmp_path):
    command = [sys.executable, str(REPOSITORY / "eval" / "vqa.py"), "--dataset", "textvqa_val", "--data", str(data)]
    command += ["--api-base", f"{server.url}/v1", "--output", str(tmp_path), "--max-new-tokens", "8"]
    before = server.metric("request_success_total")
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert server.metric("request_success_total") - before == SAMPLES
    manifest, found = read_predictions(tmp_path / "textvqa_val.jsonl")
    assert (manifest["server_model"], manifest["style"], len(found)) == ("tiny", "chat", SAMPLES)
    assert all(one.error is None and one.reply and one.tokens for one in found)
    assert len({one.reply for one in found}) > 1  # it sees the pictures
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"textvqa_val.jsonl", "textvqa_val.scores.json", "textvqa_val.html"}


def test_what_a_server_refuses_is_counted_and_the_rest_goes_on(server, data, tmp_path, capsys):
    """Here a question that is longer than its context."""
    shutil.copytree(data, tmp_path / "data")
    lines = tmp_path / "data" / "textvqa" / "textvqa_val.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    rows[2]["question"] = "why " * 5000
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ask(tmp_path / "data", tmp_path / "out", f"{server.url}/v1", "--max-new-tokens", "4") == 0
    assert f"1 of {SAMPLES} samples could not be asked" in capsys.readouterr().out
    _, found = read_predictions(tmp_path / "out" / "textvqa_val.jsonl")
    assert [one.error is not None for one in found] == [number == 2 for number in range(SAMPLES)]
    assert found[2].error.startswith("the server refused it: ")
    scores = json.loads((tmp_path / "out" / "textvqa_val.scores.json").read_text())
    assert scores["numbers"][0]["failed"] == 1


def test_a_server_that_goes_leaves_what_it_said_and_another_goes_on(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(served_model, "TRIES", 1)
    part = tmp_path / "textvqa_val.jsonl.part"
    more = ("--batch-size", "1", "--max-new-tokens", "48")
    with ServerProcess() as going:
        killer = threading.Thread(target=lambda: (_wait_for_lines(part, 3), going.process.kill()))
        killer.start()
        assert ask(data, tmp_path, f"{going.url}/v1", *more) == 1
        killer.join()
    error = one_line(capsys)
    assert error.startswith("vqa: http://127.0.0.1:")
    assert "What was answered is kept" in error
    _, before = read_predictions(part)
    assert 2 <= len(before) < SAMPLES
    assert all(one.error is None for one in before)
    with ServerProcess() as other:
        assert ask(data, tmp_path, f"{other.url}/v1", *more) == 0
        assert other.metric("request_success_total") == SAMPLES - len(before)
    _, found = read_predictions(tmp_path / "textvqa_val.jsonl")
    assert len(found) == SAMPLES
    assert {one.id: one for one in found}.items() >= {one.id: one for one in before}.items()


def _wait_for_lines(path: Path, count: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and not (path.exists() and path.read_text().count("\n") >= count):
        time.sleep(0.01)


def test_no_server_is_a_mistake(data, tmp_path, capsys):
    assert ask(data, tmp_path, "http://127.0.0.1:9/v1") == 2
    assert "is a server there?" in one_line(capsys)
    assert ask(data, tmp_path, "http://127.0.0.1:9/v1", "--model", "tiny") == 2
    assert "is a server there?" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_addresses_of_something_else_are_mistakes(server, data, tmp_path, capsys):
    assert ask(data, tmp_path, server.url) == 2
    assert "does it end in /v1?" in one_line(capsys)
    assert ask(data, tmp_path, server.url.removeprefix("http://")) == 2
    assert "is a server there?" in one_line(capsys)


def test_a_wrong_key_is_found_before_the_first_sample(data, tmp_path, capsys):
    with ServerProcess("--api-key", KEY) as guarded:
        for more in ((), ("--model", "tiny")):
            assert ask(data, tmp_path, f"{guarded.url}/v1", "--api-key", "sk-wrong", *more) == 2
            assert "does not take this key" in one_line(capsys)
        assert not any("chat/completions" in line for line in guarded.lines)
        assert ask(data, tmp_path, f"{guarded.url}/v1", "--api-key", KEY, "--limit", "1", "--max-new-tokens", "4") == 0


def test_a_model_that_is_not_there_ends_the_run(server, data, tmp_path, capsys):
    assert ask(data, tmp_path, f"{server.url}/v1", "--model", "gpt-17") == 1
    assert "gpt-17" in one_line(capsys)


def test_raw_prompts_are_not_for_a_server(server, data, tmp_path, capsys):
    where = ["--data", str(data), "--output", str(tmp_path), "--api-base", f"{server.url}/v1"]
    assert main("vqa", ["--dataset", "textvqa_val", "--style", "qwenvl", *where]) == 2
    assert "--style qwenvl" in one_line(capsys)
