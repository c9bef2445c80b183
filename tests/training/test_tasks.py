"""Datasets answered by a model that is being trained: as the evaluation's own scripts ask, or refused at once."""

import json
import sys
from pathlib import Path

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.local_model import messages
from qwenvl_jax.evaluation.predictions import read_predictions
from qwenvl_jax.evaluation.task import PICTURE, Sample, Task
from qwenvl_jax.training import cli
from qwenvl_jax.training.recipe import Recipe, RecordsRecipe, TasksRecipe
from qwenvl_jax.training.tasks import Asked, Tasks, open_tasks
from qwenvl_jax.vlm import VLM, load


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load("tiny", dtype="float32")


def recipe(**fields) -> Recipe:
    return Recipe(evaluate=TasksRecipe(**fields))


def test_answers_are_those_of_chat_and_a_bad_sample_costs_itself_alone(vlm, tmp_path):
    (asked,) = open_tasks(recipe(tasks=("scenes",), limit=4))
    broken = Sample("broken", f"{PICTURE}What is it?", (b"no picture",), dict(asked.samples[0].reference))
    long = Sample("long", "why " * 9000, (), dict(asked.samples[0].reference))
    told: list[str] = []
    samples = [asked.samples[0], broken, *asked.samples[1:], long]
    scores = Tasks([Asked(asked.task, samples, chats=True)], tmp_path).answer(vlm, 7, told.append)
    _, found = read_predictions(tmp_path / "7" / "scenes.jsonl")
    assert [one.id for one in found] == [sample.id for sample in samples]
    assert [one.error is not None for one in found] == [False, True, False, False, False, True]
    assert [one.reply for one in found if one.error is None] == [
        vlm.chat(messages(sample), temperature=0, max_new_tokens=64).text for sample in asked.samples
    ]
    assert told == [f"scenes: 2 of 6 samples could not be asked, see {tmp_path / '7' / 'scenes.jsonl'}"]
    kept = json.loads((tmp_path / "7" / "scenes.scores.json").read_text())
    assert scores == {"scenes/accuracy": pytest.approx(kept["numbers"][0]["value"])}
    assert scores["scenes/accuracy"] > 40  # the tiny model is good at them
    again = Tasks([Asked(asked.task, samples[:1], chats=True)], tmp_path).answer(vlm, 7, told.append)
    assert len(read_predictions(tmp_path / "7" / "scenes.jsonl")[1]) == 1  # made anew
    assert again["scenes/accuracy"] in (0, 100)


def test_what_learns_bare_text_is_asked_raw_prompts_and_choices(vlm, tmp_path):
    task = Task("choices", "multiple_choice", (), lambda *_: [], "choice_accuracy")
    samples = [
        Sample(
            "a",
            f"{PICTURE}Is there a star? Answer:",
            (_picture(),),
            {"answer": 0, "choices": ["yes", "no"]},
            (" A", " B"),
        ),
        Sample("b", f"{PICTURE}Which shape is it? Answer:", (_picture(),), {"answer": 1, "choices": ["a", "b"]}),
    ]
    Tasks([Asked(task, samples, chats=False)], tmp_path).answer(vlm, 1, print)
    first, second = read_predictions(tmp_path / "1" / "choices.jsonl")[1]
    expected = vlm.score(samples[0].prompt, samples[0].choices, samples[0].pictures, per_token=True)
    assert first.likelihoods == pytest.approx(tuple(expected))
    assert first.reply == "AB"[int(expected.argmax())]
    said = vlm.generate(samples[1].prompt, samples[1].pictures, temperature=0, max_new_tokens=10)
    assert second.reply == said.text.strip()


def _picture() -> Path:
    return Path(__file__).parents[2] / "qwenvl_jax" / "assets" / "pictures" / "word.png"


def test_what_cannot_be_asked_is_a_mistake(tmp_path):
    for name, message in (
        ("scene", "evaluate.tasks: 'scene' is no dataset; did you mean scenes"),
        ("touchstone_en", "a judge scores it"),
        ("docvqa_test", "kept by a server"),
        ("textvqa_val", "textvqa_val"),
    ):
        with pytest.raises(UserError, match=message):
            open_tasks(recipe(tasks=(name,), data=str(tmp_path)))
    with pytest.raises(UserError, match=r"evaluate\.limit"):
        TasksRecipe(limit=0)


def test_the_style_is_that_of_what_is_learnt():
    assert open_tasks(Recipe()) == []
    raw = RecordsRecipe(files=("x.json",), template="raw")
    (asked,) = open_tasks(Recipe(records=raw, start="tiny", evaluate=TasksRecipe(tasks=("scenes",), limit=1)))
    assert not asked.chats


def test_a_misspelt_task_ends_before_the_run_begins(tmp_path, monkeypatch, capsys):
    recipe = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    arguments = ["train.py", str(recipe), "--output", str(tmp_path / "run"), "--evaluate.tasks", "scene"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert error == "train: evaluate.tasks: 'scene' is no dataset; did you mean scenes?\n"
    assert not (tmp_path / "run").exists()
