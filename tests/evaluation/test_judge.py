"""Judging over HTTP: both orders, what cannot be read, a judge that is killed, and the score that comes out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation.judge_server import REFUSED, JudgeServer, prompt

from qwenvl_jax.evaluation.command import main
from qwenvl_jax.evaluation.miniature import draw
from qwenvl_jax.evaluation.predictions import read_predictions, write_predictions
from qwenvl_jax.evaluation.task import PICTURE, Prediction

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_proxy")


def touchstone(path: Path, *replies: str | None) -> Path:
    """Predictions of TouchStone; None is a sample that failed."""
    reference = {"question": "What is {there}?", "human_annotation": "A red cube.", "gpt4_ha_answer": "The right one."}
    found = [
        Prediction(f"q{number}", reply or "", reference, {"category": "c"}, error=None if reply is not None else "lost")
        for number, reply in enumerate(replies)
    ]
    write_predictions(path, {"task": "touchstone_en", "metric": "touchstone", "samples": len(found)}, found)
    return path


def fair(text: str) -> str:
    """8 for the reference answer, 6 for any other."""
    first, _, second = text.partition("## Answer of assistant 2")
    return f"{8 if 'The right one' in first else 6} {8 if 'The right one' in second else 6}\nbecause it is so"


def run(*arguments: object, family: str = "touchstone") -> int:
    return main(family, [str(argument) for argument in arguments])


def scores(path: Path) -> dict[str, float]:
    return {number["name"]: number["value"] for number in json.loads(path.read_text())["numbers"]}


def test_a_reply_is_judged_in_both_orders_from_text_alone(tmp_path, capsys):
    file = touchstone(tmp_path / "answers.jsonl", "A cube.", None, f"A {PICTURE} ball.")
    before = file.read_bytes()
    with JudgeServer(fair) as judge:
        assert run("--predictions", file, "--judge-base", judge.url) == 0
    assert len(judge.asked) == 4
    assert {(body["model"], body["temperature"]) for body in judge.asked} == {("judge", 0)}
    assert all("A red cube." in prompt(body) and "What is {there}?" in prompt(body) for body in judge.asked)
    manifest, found = read_predictions(tmp_path / "answers.judged.jsonl")
    assert manifest["judge"]["model"] == "judge"
    assert [one.reference.get("judgements") for one in found] == [
        ["8 6\nbecause it is so", "6 8\nbecause it is so"],
        None,
        ["8 6\nbecause it is so", "6 8\nbecause it is so"],
    ]
    assert file.read_bytes() == before
    # One without a reply gets 0 in both orders: (6 + 6 + 0 + 0 + 6 + 6) / 6.
    assert scores(tmp_path / "answers.judged.scores.json")["score"] == pytest.approx(400)
    assert scores(tmp_path / "answers.judged.scores.json")["judged"] == 100
    assert "cannot be read" not in capsys.readouterr().out


def test_what_a_judge_did_not_say_is_counted_listed_and_kept(tmp_path, capsys):
    file = touchstone(tmp_path / "answers.jsonl", "good", "vague", REFUSED)
    with JudgeServer(lambda text: "Both are fine." if "vague" in text else fair(text)) as judge:
        assert run("--predictions", file, "--judge-base", judge.url) == 0
    out = capsys.readouterr().out
    assert "2 of 6 requests could not be asked" in out
    assert "q2/1, q2/2" in out
    assert "2 of 6 requests gave a reply that cannot be read" in out
    assert "q1/1, q1/2" in out
    _, found = read_predictions(tmp_path / "answers.judged.jsonl")
    assert found[1].reference["judgements"] == ["Both are fine."] * 2
    assert found[2].reference["judgements"] == [None, None]
    assert scores(tmp_path / "answers.judged.scores.json")["score"] == pytest.approx(600)
    assert scores(tmp_path / "answers.judged.scores.json")["judged"] == pytest.approx(100 / 3)


def test_a_killed_judging_goes_on_where_it_was(tmp_path):
    replies = [f"answer {number}" for number in range(12)]
    file, other = (touchstone(tmp_path / name / "answers.jsonl", *replies) for name in _folders(tmp_path, "a", "b"))
    command = [sys.executable, str(REPOSITORY / "eval" / "touchstone.py"), "--batch-size", "2", "--judge-base"]

    def slow(text: str) -> str:
        time.sleep(0.1)
        return fair(text)

    with JudgeServer(slow) as judge:
        process = subprocess.Popen([*command, judge.url, "--predictions", str(file)], cwd=REPOSITORY)
        part = file.with_name("answers.judge.jsonl.part")
        end = time.monotonic() + 60
        while time.monotonic() < end and not (part.exists() and part.read_text().count("\n") > 5):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = part.read_text().count("\n") - 1
        assert 5 <= kept < 24
        before = len(judge.asked)
        assert run("--predictions", file, "--judge-base", judge.url) == 0
        assert len(judge.asked) - before == 24 - kept
        assert run("--predictions", other, "--judge-base", judge.url) == 0
        before = len(judge.asked)
        assert run("--predictions", other, "--judge-base", judge.url) == 0  # nothing is left to ask
        assert len(judge.asked) == before
    for name in ("answers.judge.jsonl", "answers.judged.jsonl"):
        assert file.with_name(name).read_bytes() == other.with_name(name).read_bytes()


def _folders(folder: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (folder / name).mkdir()
    return names


def test_judgements_of_two_judges_or_of_other_predictions_do_not_mix(tmp_path, capsys):
    file = touchstone(tmp_path / "answers.jsonl", "one")
    with JudgeServer(fair) as judge, JudgeServer(fair, "stern") as stern:
        assert run("--predictions", file, "--judge-base", judge.url) == 0
        assert run("--predictions", file, "--judge-base", stern.url) == 2
        assert "stern" in _one_line(capsys)
        assert run("--predictions", file, "--judge-base", stern.url, "--overwrite") == 0
        touchstone(file, "two")
        assert run("--predictions", file, "--judge-base", stern.url) == 2
        assert "sha256" in _one_line(capsys)
        judged = tmp_path / "answers.judged.jsonl"
        assert run("--predictions", judged, "--judge-base", stern.url) == 2
        assert "judged already" in _one_line(capsys)
        assert run("--predictions", judged) == 0


def test_without_a_judge_the_predictions_stay_and_a_line_says_how(tmp_path, capsys):
    file = touchstone(tmp_path / "answers.jsonl", "one")
    assert run("--predictions", file) == 0
    out = capsys.readouterr().out
    assert "--judge-base" in out
    assert out.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_mistakes_about_judges_are_one_line(tmp_path, capsys):
    file = touchstone(tmp_path / "answers.jsonl", "one")
    assert run("--predictions", file, "--judge-model", "x") == 2
    assert "--judge-base" in _one_line(capsys)
    assert run("--dataset", "textvqa_val", "--judge-base", "http://127.0.0.1:9/v1", family="vqa") == 2
    assert "by rules" in _one_line(capsys)
    assert run("--predictions", file, "--judge-base", "http://127.0.0.1:9/v1") == 2
    assert "is a server there?" in _one_line(capsys)
    with pytest.raises(SystemExit):
        run("--judge-base", "http://127.0.0.1:9/v1", family="mme")


def _one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_judge_extracts_the_answers_of_mathvista(tmp_path, capsys):
    choice = {"question_type": "multi_choice", "answer_type": "text", "choices": ["2", "5"], "answer": "5"}
    number = {"question_type": "free_form", "answer_type": "integer", "precision": None, "choices": [], "answer": "7"}
    said = {
        "It is the second of them.": "(B)",  # no rule finds that
        "Seven, not 8.": "7",
        "I cannot see a 7.": "NO ANSWER",
        "It must be 7": "",  # left to the rules
    }
    replies = [*said, ""]
    found = [
        Prediction(str(place), reply, choice if not place else number, question="How many?")
        for place, reply in enumerate(replies)
    ]
    file = tmp_path / "math.jsonl"
    write_predictions(file, {"task": "mathvista_testmini", "metric": "mathvista"}, found)
    with JudgeServer(lambda text: next(judged for reply, judged in said.items() if reply in text)) as judge:
        assert run("--predictions", file, "--judge-base", judge.url, family="vqa") == 0
    assert len(judge.asked) == 4
    assert "1 of 4 requests gave a reply that cannot be read" in capsys.readouterr().out
    _, judged = read_predictions(tmp_path / "math.judged.jsonl")
    assert [one.reference.get("extraction") for one in judged] == ["(B)", "7", "", None, None]
    assert scores(tmp_path / "math.judged.scores.json")["accuracy"] == pytest.approx(60)


def test_this_projects_server_may_answer_and_judge(server, tmp_path, capsys):
    """The tiny model says no scores, which is seen."""
    draw(tmp_path / "data", samples=2)
    where = ("--data", tmp_path / "data", "--output", tmp_path, "--max-new-tokens", 8)
    url = f"{server.url}/v1"
    assert run("--dataset", "touchstone_en", *where, "--api-base", url, "--judge-base", url) == 0
    assert "4 of 4 requests gave a reply that cannot be read" in capsys.readouterr().out
    _, found = read_predictions(tmp_path / "touchstone_en.judged.jsonl")
    assert all(isinstance(reply, str) for one in found for reply in one.reference["judgements"])
    assert scores(tmp_path / "touchstone_en.judged.scores.json") == {
        "score": None,
        "reference answer": None,
        "judged": 0,
    }
