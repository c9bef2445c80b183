"""Few-shot prompts: which records are drawn, how they are written, and what is refused."""

import json
import random

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import PICTURE, Reading
from qwenvl_jax.evaluation.tasks.registry import TASKS
from qwenvl_jax.evaluation.tasks.vqa_sources import TRAINING


def samples(name, data, **reading):
    return list(TASKS[name].read(data, Reading(**reading)))


def test_examples_are_those_of_the_original(drawn):
    """The original's loop: random.seed once, then for each question random.sample of the lines of the training file."""
    lines = (drawn / "vqav2" / "vqav2_train.jsonl").read_text().splitlines()
    random.seed(3)
    for sample in samples("vqav2_val", drawn, few_shot=2, seed=3):
        text = ""
        pictures = []
        for record in map(json.loads, random.sample(lines, 2)):
            text += "<img></img>{} Answer:".format(record["question"]) + f" {record['answer']}"
            pictures.append(record["image"])
        assert sample.prompt == text + f"<img></img>{sample.question} Answer:"
        assert [f"data/{path.relative_to(drawn).as_posix()}" for path in sample.pictures[:-1]] == pictures
        assert sample.prompt.count(PICTURE) == len(sample.pictures) == 3


def test_captions_as_well(drawn):
    annotations = json.loads((drawn / "flickr30k" / "flickr30k_karpathy_train.json").read_text())["annotations"]
    random.seed(0)
    for sample in samples("flickr", drawn, few_shot=1):
        (record,) = random.sample(annotations, 1)
        prompt = "<img></img>Describe the image in English:"
        assert sample.prompt == f"{prompt} {record['caption']}{prompt}"


@pytest.mark.parametrize("name", [*TRAINING, "flickr", "coco"])
def test_every_dataset_that_has_a_training_file(name, drawn):
    found = samples(name, drawn, few_shot=3)
    assert all(len(sample.pictures) == 4 for sample in found)
    assert all(path.is_file() for sample in found for path in sample.pictures)
    assert len({sample.prompt for sample in found}) > 1


def test_the_seed_decides(drawn):
    prompts = [[s.prompt for s in samples("okvqa_val", drawn, few_shot=2, seed=seed)] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_of_several_answers_one_is_shown(drawn):
    sample = samples("docvqa_val", drawn, few_shot=1)[0]
    assert "[" not in sample.prompt


def test_what_is_refused(data):
    with pytest.raises(UserError, match="refcoco_val: there is no training file to draw 2 worked examples from"):
        samples("refcoco_val", data, few_shot=2)
    with pytest.raises(UserError, match="nocaps: there is no training file"):
        samples("nocaps", data, few_shot=1)
    with pytest.raises(UserError, match="9 worked examples are asked for, and the training file holds 8"):
        samples("okvqa_val", data, few_shot=9)
    with pytest.raises(UserError, match="ask in style qwenvl"):
        samples("okvqa_val", data, few_shot=1, style="chat")
    for path in (data / "gqa").glob("train*"):
        path.unlink()
    with pytest.raises(UserError, match="gqa/train_balanced.jsonl: is missing for worked examples"):
        samples("gqa_testdev", data, few_shot=1)
    assert samples("gqa_testdev", data)
