"""A checkpoint answers many samples at once what it answers one by one, and says of each why it cannot be asked."""

import itertools
from pathlib import Path

import pytest

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import runner
from qwenvl_jax.evaluation.local_model import LocalModel, messages
from qwenvl_jax.evaluation.task import PICTURE, Reading, Sample
from qwenvl_jax.evaluation.tasks.registry import TASKS


@pytest.fixture(scope="module")
def model():
    with LocalModel(qwenvl_jax.load("tiny"), True, TASKS["scenes"].decoding) as found:
        yield found


@pytest.fixture(scope="module")
def samples():
    return list(itertools.islice(TASKS["scenes"].read(Path(), Reading("chat")), 150))


def test_answers_are_those_of_chat(model, samples):
    """Questions about some fifteen scenes, of replies from one token to forty."""
    found = {}
    for batch in runner.batches(samples, model):
        answers = model.answers(batch)
        found |= {sample.id: answer for sample, answer in zip(batch, answers, strict=True)}
    alone = {sample.id: model.vlm.chat(messages(sample), max_new_tokens=64) for sample in samples}
    assert {name: answer.text for name, answer in found.items()} == {name: r.text for name, r in alone.items()}
    assert [found[name].tokens for name in alone] == [reply.usage.completion_tokens for reply in alone.values()]


def test_one_that_cannot_be_asked_leaves_the_others_alone(model, samples):
    most = model.vlm.config.max_position_embeddings
    asked = [
        samples[0],
        Sample("no picture", PICTURE + "what?", (b"none",), {}),
        Sample("long", "what " * most, (), {}),
        Sample("places", "what?", samples[0].pictures, {}),
        samples[1],
    ]
    answers = model.answers(asked)
    assert [type(answer) for answer in answers[1:4]] == [type(answers[1]), UserError, UserError]
    assert isinstance(answers[1], UserError)
    assert f"1 to {most - 1} are possible" in str(answers[2])
    assert "0 places for 1 pictures" in str(answers[3])
    assert [answers[0].text, answers[4].text] == [answer.text for answer in model.answers(samples[:2])]
