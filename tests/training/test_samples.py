"""Answers kept for the eye: the right questions, the right expectation, one set of compiled programs for all models."""

import json

import jax
import pytest
from flax import nnx
from PIL import Image

from qwenvl_jax.checkpoints.adapters import add_adapters
from qwenvl_jax.checkpoints.folder import locate, read_config
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.data.records import Record
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.samples import SIDE, Samples, record_questions, scene_records
from qwenvl_jax.vlm import VLM

PICTURE = "qwenvl_jax/assets/pictures/word.png"


@pytest.fixture(scope="module")
def processor() -> Processor:
    folder = locate("tiny")
    return Processor.from_folder(folder, read_config(folder))


def test_the_question_and_the_answer_are_the_last_ones(processor):
    def record(*messages: tuple, where: str = "mine.json:1") -> Record:
        return Record([{"role": role, "content": content} for role, content in messages], where)

    picture = {"type": "image", "image": PICTURE}
    found = record_questions(
        [
            record(("user", "hello"), ("assistant", "hi"), ("user", "and now?"), ("assistant", "well")),
            record(("user", [{"type": "image", "image": "gone.png"}]), ("assistant", "never")),
            record(
                ("user", [picture, {"type": "text", "text": "Where is "}, {"type": "ref", "ref": "it"}]),
                (
                    "assistant",
                    [{"type": "text", "text": "there: "}, {"type": "box", "box": [0, 0, 10, 10], "label": "it"}],
                ),
                where="mine.json:3",
            ),
            record(("user", "not asked"), ("assistant", "no")),
        ],
        processor,
        2,
    )
    assert [(asked.question, asked.where) for asked in found] == [
        ("and now?", "mine.json:1"),
        ("Where is it", "mine.json:3"),
    ]
    assert found[0].expected == "well"
    assert len(found[0].messages) == 3
    assert found[1].expected.startswith("there: <ref>it</ref><box>(0,0),(")
    assert isinstance(found[1].messages[0]["content"][0]["image"], Image.Image)  # read once


def test_scenes_ask_all_kinds_and_the_same_every_time(processor):
    first, again = (record_questions(scene_records(0), processor, 4) for _ in range(2))
    assert [asked.question for asked in first] == [asked.question for asked in again]
    assert "<box>" in first[0].expected
    assert len({asked.question for asked in first}) == 4


def test_answers_are_those_of_chat_whatever_the_weights_and_compile_once(processor, tmp_path):
    model = load_model(locate("tiny"), dtype="float32", stacked=True)
    samples = Samples(record_questions(scene_records(0), processor, 2), processor, tmp_path)
    other = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(0), x.shape), model)
    samples.answer(model, 10)
    samples.answer(other, 20)
    compiled = samples.vlm.generator.programs.compiled
    samples.answer(model, 30)
    samples.answer(other, 40)
    assert samples.vlm.generator.programs.compiled == compiled
    kept = {step: (tmp_path / str(step) / "samples.jsonl").read_text() for step in (10, 20, 30, 40)}
    assert kept[10] == kept[30] != kept[20] == kept[40]
    vlm = VLM(model, processor)
    for line, asked in zip(map(json.loads, kept[10].splitlines()), samples.asked, strict=True):
        assert line["answer"] == vlm.chat(asked.messages).text
        assert max(Image.open(tmp_path / "10" / line["picture"]).size) == SIDE


def test_models_with_an_adapter_and_on_a_mesh_answer_too(processor, tmp_path):
    asked = record_questions(scene_records(0), processor, 2)
    mesh = make_mesh("tensor", jax.devices()[:2])
    plain, spread = (load_model(locate("tiny"), dtype="float32", mesh=where) for where in (None, mesh))
    adapted = add_adapters(spread, LoraRecipe(rank=2), nnx.Rngs(0))  # which begins by changing nothing
    for name, model in (("plain", plain), ("spread", adapted)):
        Samples(asked, processor, tmp_path / name).answer(model, 1)
    plain, spread = ((tmp_path / name / "1" / "samples.jsonl").read_text() for name in ("plain", "spread"))
    assert plain == spread
