"""The runner: every sample is answered once, whatever fails, and what was answered is kept when the model is lost."""

import threading
from pathlib import Path

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import runner
from qwenvl_jax.evaluation.predictions import Part, Pictures, read_predictions
from qwenvl_jax.evaluation.runner import Answer, Lost
from qwenvl_jax.evaluation.task import PICTURE, Prediction, Sample


class Parrot:
    """Says the prompt; fails where it says so."""

    at_once = 4

    def __init__(self, together=1):
        self.together, self.asked, self.lock = together, [], threading.Lock()

    def check(self, samples):
        self.checked = [sample.id for sample in samples]

    def length(self, sample):
        return len(sample.prompt)

    def answers(self, samples):
        assert 0 < len(samples) <= self.together
        with self.lock:
            self.asked += [sample.id for sample in samples]
        return [self.answer(sample) for sample in samples]

    def answer(self, sample):
        if "broken" in sample.prompt:
            return UserError("no picture")
        if "gone" in sample.prompt:
            raise Lost("the server is gone")
        if sample.choices:
            return Answer(likelihoods=tuple(-float(len(choice)) for choice in sample.choices))
        return Answer(sample.prompt.upper(), finish_reason="stop", tokens=2)


def sample(number, prompt="say", **fields):
    return Sample(f"q{number}", f"{prompt} {number}", (), {"answers": [str(number)]}, **fields)


def run(tmp_path, samples, model):
    path = tmp_path / "p.jsonl"
    part = Part(path, {"task": "t"})
    with part:
        counts = runner.predict(samples, model, part, Pictures(path))
    part.finish([each.id for each in samples])
    return counts, read_predictions(path)[1]


@pytest.mark.parametrize("together", [1, 8])
def test_every_sample_is_answered_once_in_order(tmp_path, together):
    samples, model = [sample(number) for number in range(50)], Parrot(together)
    counts, found = run(tmp_path, samples, model)
    assert [prediction.id for prediction in found] == [each.id for each in samples]
    assert [prediction.reply for prediction in found] == [f"SAY {number}" for number in range(50)]
    assert sorted(model.asked) == sorted(each.id for each in samples)
    assert (counts.total, counts.done, counts.asked, counts.failed, counts.tokens) == (50, 50, 50, 0, 100)


def test_one_that_cannot_be_asked_is_counted_and_the_rest_goes_on(tmp_path):
    samples = [sample(number, "broken" if number == 3 else "say") for number in range(8)]
    counts, found = run(tmp_path, samples, Parrot(together=8))
    assert counts.failed == 1
    assert found[3].error == "no picture"
    assert found[3].reply == ""
    assert all(prediction.error is None for prediction in found if prediction.id != "q3")


def test_what_was_answered_is_kept_when_the_model_is_lost(tmp_path):
    path, samples, model = tmp_path / "p.jsonl", [sample(number) for number in range(30)], Parrot()
    lost = [*samples[:-1], sample(29, "gone")]
    with pytest.raises(Lost, match="gone"), Part(path, {"task": "t"}) as part:
        runner.predict(lost, model, part, Pictures(path))
    kept = Part(path, {"task": "t"}).done
    assert "q29" not in kept
    again = Parrot()
    _, found = run(tmp_path, samples, again)
    assert len(found) == 30
    assert sorted(again.asked) == sorted({each.id for each in samples} - kept)


def test_a_batch_that_was_cut_off_is_asked_again_as_a_whole(tmp_path):
    """Answers depend a little on what else is in a batch, and must not depend on where a run was killed."""
    path, samples, model = tmp_path / "p.jsonl", [sample(number) for number in range(20)], Parrot(together=4)
    whole = runner.batches(samples, model)
    with Part(path, {"task": "t"}) as part:
        for each in [*whole[0], *whole[1][:1]]:
            part.append(Prediction(each.id, "kept", {}))
    counts, found = run(tmp_path, samples, model)
    assert sorted(model.asked) == sorted(each.id for batch in whole[1:] for each in batch)
    assert (counts.total, counts.done, counts.asked) == (20, 20, 15)
    assert sum(prediction.reply == "kept" for prediction in found) == 5


def test_the_likeliest_choice_is_the_reply(tmp_path):
    _, found = run(tmp_path, [sample(0, choices=(" long", " s", " mid"))], Parrot())
    assert (found[0].choice, found[0].reply, found[0].likelihoods) == (1, "s", (-5.0, -2.0, -4.0))


def test_questions_about_one_picture_follow_one_another():
    samples = [
        Sample(f"{picture}{n}", "x" * (n + 1), (Path(f"{picture}.png"),), {}) for n in range(3) for picture in "ab"
    ]
    long = Sample("long", "x" * 99, (), {})

    def ids(together):
        return [[each.id for each in batch] for batch in runner.batches([*samples, long], Parrot(together))]

    assert ids(4) == [["long", "a2", "a1", "a0"], ["b2", "b1", "b0"]]
    assert ids(3) == [["long"], ["a2", "a1", "a0"], ["b2", "b1", "b0"]]
    assert ids(2) == [["long"], ["a2", "a1"], ["a0"], ["b2", "b1"], ["b0"]]


def test_a_blind_sample_shows_noise_of_as_many_pictures():
    seen = Sample("a", PICTURE * 2, (b"1", b"2"), {})
    blind = runner.blind(seen)
    assert len(blind.pictures) == 2
    assert blind.pictures[0] != blind.pictures[1]
    assert blind == runner.blind(seen)
    assert runner.blind(Sample("b", "", (), {})).pictures == ()
