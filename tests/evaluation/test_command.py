"""The real commands of `eval/` on miniatures of the benchmarks, with the model that ships."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenvl_jax.evaluation import command
from qwenvl_jax.evaluation.predictions import read_predictions
from qwenvl_jax.evaluation.tasks.registry import TASKS

REPOSITORY = Path(__file__).parents[2]
SMALL = ["--batch-size", "4"]


def words(family, name, data, output, *more):
    """The arguments of an evaluation."""
    script = str(REPOSITORY / "eval" / f"{family}.py")
    return [sys.executable, script, "--dataset", name, "--data", str(data), "--output", str(output), *SMALL, *more]


def run(*arguments):
    return subprocess.run(words(*arguments), capture_output=True, text=True, check=False, timeout=600)


def main(family, name, data, output, *more):
    """The same in this process."""
    return command.main(family, words(family, name, data, output, *more)[2:])


def test_a_dataset_from_the_command_to_the_page(drawn, tmp_path):
    done = run("vqa", "chartqa_test_human", drawn, tmp_path)
    assert done.returncode == 0, done.stderr
    manifest, found = read_predictions(tmp_path / "chartqa_test_human.jsonl")
    assert manifest["task"] == "chartqa_test_human"
    assert manifest["checkpoint"] == "tiny"
    assert len(manifest["fingerprint"]) == 16
    assert manifest["decoding"]["max_new_tokens"] == 100
    assert manifest["samples"] == len(found) == 8
    assert all(prediction.error is None and prediction.tokens for prediction in found)
    assert "relaxed_accuracy" in done.stdout
    assert json.loads((tmp_path / "chartqa_test_human.scores.json").read_text())["samples"] == 8
    assert "<html" in (tmp_path / "chartqa_test_human.html").read_text()
    # Scores are made of the file alone, and another metric's are, too.
    before = (tmp_path / "chartqa_test_human.jsonl").read_bytes()
    assert command.main("vqa", ["--predictions", str(tmp_path / "chartqa_test_human.jsonl"), "--metric", "qwenvl"]) == 0
    assert json.loads((tmp_path / "chartqa_test_human.scores.json").read_text())["variant"] == "qwenvl"
    assert (tmp_path / "chartqa_test_human.jsonl").read_bytes() == before


def test_choices_are_ranked_or_written(drawn, tmp_path):
    assert main("multiple_choice", "scienceqa_test_img", drawn, tmp_path) == 0
    ranked = read_predictions(tmp_path / "scienceqa_test_img.jsonl")[1]
    assert all(len(one.likelihoods) == len(one.reference["choices"]) for one in ranked)
    assert all(one.choice == one.likelihoods.index(max(one.likelihoods)) for one in ranked)
    assert main("multiple_choice", "scienceqa_test_img", drawn, tmp_path / "written", "--generate") == 0
    written = read_predictions(tmp_path / "written" / "scienceqa_test_img.jsonl")[1]
    assert all(one.choice is None and one.tokens for one in written)


def test_broken_pictures_are_counted_and_listed(data, tmp_path, capsys):
    broken, missing, *_ = sorted((data / "coco" / "val2014").iterdir())
    broken.write_bytes(b"\xff\xd8 no picture")
    missing.unlink()
    assert main("yes_no", "pope", data, tmp_path / "out") == 0
    found = read_predictions(tmp_path / "out" / "pope.jsonl")[1]
    failed = [one for one in found if one.error is not None]
    assert {Path(one.pictures[0]) for one in failed} == {broken, missing}
    assert len(failed) < len(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{len(failed)} of {len(found)} samples could not be asked" in printed
    assert all(one.id in (tmp_path / "out" / "pope.html").read_text() for one in failed)


def test_a_blind_run_is_another_run(tmp_path, capsys):
    assert main("scenes", "scenes", tmp_path, tmp_path, "--limit", "3", "--blind") == 0
    assert read_predictions(tmp_path / "scenes.jsonl")[0]["blind"]
    assert main("scenes", "scenes", tmp_path, tmp_path, "--limit", "3") == 2
    assert "blind" in capsys.readouterr().err


def test_shards_make_the_file_of_one_run(tmp_path, capsys):
    whole = ["--limit", "6"]
    assert main("scenes", "scenes", tmp_path, tmp_path / "one", *whole) == 0
    capsys.readouterr()
    assert main("scenes", "scenes", tmp_path, tmp_path / "two", *whole, "--shard", "1/2") == 0
    assert "accuracy" not in capsys.readouterr().out
    assert main("scenes", "scenes", tmp_path, tmp_path / "two", *whole, "--shard", "0/2") == 0
    assert "accuracy" in capsys.readouterr().out
    one, two = (tmp_path / name / "scenes.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--dataset", "chartqa_test_humn"], "did you mean chartqa_test_human"),
        (["--dataset", "mme"], "eval/mme.py"),
        (["--dataset", "docvqa_val", "--data", "nowhere"], "nowhere"),
        (["--dataset", "docvqa_val", "--metric", "offical"], "official"),
        (["--predictions", "none.jsonl"], "none.jsonl"),
        ([], "--dataset"),
        (["--dataset", "chartqa_test_human", "--checkpoint", "no-such-folder"], "no-such-folder"),
    ],
)
def test_mistakes_end_in_one_line(drawn, tmp_path, capsys, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    assert command.main("vqa", ["--data", str(drawn), *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_answers_kept_by_a_server_are_not_scored(drawn, tmp_path, capsys):
    assert main("vqa", "vqav2_testdev", drawn, tmp_path, "--limit", "2") == 0
    assert "server" in capsys.readouterr().out
    assert len(read_predictions(tmp_path / "vqav2_testdev.jsonl")[1]) == 2


@pytest.mark.long
def test_a_model_on_two_devices_says_the_same(tmp_path):
    for number in ("1", "2"):
        assert main("scenes", "scenes", tmp_path, tmp_path / number, "--limit", "4", "--tensor", number) == 0
    one, two = (read_predictions(tmp_path / number / "scenes.jsonl")[1] for number in ("1", "2"))
    assert [each.reply for each in one] == [each.reply for each in two]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.family != "touchstone"])
def test_every_dataset_runs_end_to_end(name, drawn, tmp_path):
    assert main(TASKS[name].family, name, drawn, tmp_path, "--limit", "4") == 0
    manifest, found = read_predictions(tmp_path / f"{name}.jsonl")
    assert 0 < len(found) <= 4
    assert not [one.error for one in found if one.error]
    assert (tmp_path / f"{name}.html").exists() == bool(manifest["metric"])


@pytest.mark.long
def test_killed_ten_times_the_file_is_that_of_an_undisturbed_run(tmp_path):
    arguments = ("scenes", "scenes", tmp_path, tmp_path / "killed", "--limit", "160")
    undisturbed = run("scenes", "scenes", tmp_path, tmp_path / "whole", "--limit", "160")
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng, part, kills = random.Random(0), tmp_path / "killed" / "scenes.jsonl.part", 0
    while kills < 10:
        process = subprocess.Popen(words(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = part.stat().st_size if part.exists() else 0
        more = rng.randrange(1, 4000) if kills % 3 else 0  # bytes of predictions; at times the first that comes
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            if (part.stat().st_size if part.exists() else 0) > before + more:
                break
            time.sleep(0.002)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break  # it was done before it could be killed again
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 5
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed" / "scenes.jsonl").read_bytes() == (tmp_path / "whole" / "scenes.jsonl").read_bytes()
