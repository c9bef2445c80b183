"""Files of predictions: what is written is read, a killed run goes on, shards come together, and mistakes are named."""

import json

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.predictions import Part, Pictures, Shard, line, read_predictions
from qwenvl_jax.evaluation.task import Prediction

MANIFEST = {"task": "t", "decoding": {"max_new_tokens": 10}, "style": "chat"}


def predictions(count):
    return [
        Prediction(
            f"q{number}",
            f"réponse {number}\u2028\n",
            {"answers": ["a", "b"]},
            {"kind": "x"},
            "?",
            choice=number,
            likelihoods=(-1.5, -0.25),
            pictures=("a.png",),
            finish_reason="stop",
            tokens=3,
            error=None if number % 3 else "broken",
        )
        for number in range(count)
    ]


def made(path, found, order=None, **options):
    part = Part(path, MANIFEST, **options)
    with part:
        for prediction in order or found:
            part.append(prediction)
    return part.finish([prediction.id for prediction in found])


def test_what_is_written_is_read(tmp_path):
    found = predictions(5)
    assert made(tmp_path / "p.jsonl", found, order=found[::-1])
    assert read_predictions(tmp_path / "p.jsonl") == (MANIFEST, found)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_fields_at_their_default_are_left_out():
    assert json.loads(line(Prediction("a", "", {}))) == {"id": "a", "reply": ""}


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_goes_on_where_it_was_killed(tmp_path, cut):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    found = predictions(6)
    made(whole, found)
    with Part(path, MANIFEST) as part:
        for prediction in found[:4]:
            part.append(prediction)
    kept = path.with_name("p.jsonl.part")
    kept.write_bytes(kept.read_bytes()[:-cut])  # the last line was being written
    part = Part(path, MANIFEST)
    assert part.done == {prediction.id for prediction in found[:3]}
    with part:
        for prediction in found:
            if prediction.id not in part.done:
                part.append(prediction)
    assert part.finish([prediction.id for prediction in found])
    assert path.read_bytes() == whole.read_bytes()


def test_a_manifest_that_was_being_written_is_no_beginning(tmp_path):
    (tmp_path / "p.jsonl.part").write_text('{"manifest": {"ta')
    assert made(tmp_path / "p.jsonl", predictions(2))


def test_shards_come_together_whoever_is_last(tmp_path):
    found = predictions(7)
    made(tmp_path / "whole.jsonl", found)
    path = tmp_path / "p.jsonl"
    for index in (2, 0, 1):
        shard = Shard(index, 3)
        share = [found[place] for place in shard.share(7)]
        assert made(path, share, order=share[::-1], shard=shard) == (index == 1)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.jsonl", "whole.jsonl"]
    assert Part(path, MANIFEST, Shard(0, 3)).complete


def test_a_shard_that_is_done_is_not_done_again(tmp_path):
    found = predictions(4)
    made(tmp_path / "p.jsonl", found[:2], shard=Shard(0, 2))
    again = Part(tmp_path / "p.jsonl", MANIFEST, Shard(0, 2))
    assert again.complete
    assert not again.finish(["q0", "q1"])
    assert not Part(tmp_path / "p.jsonl", MANIFEST, Shard(1, 2)).complete


def test_shares_are_contiguous_and_whole():
    for total, count in ((10, 4), (3, 5), (0, 2), (8, 1)):
        shares = [list(Shard(index, count).share(total)) for index in range(count)]
        assert [place for share in shares for place in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Shard.of("2/8") == Shard(2, 8)
    for text in ("2", "8/8", "-1/2", "a/b", "1/2/3"):
        with pytest.raises(UserError, match="shard"):
            Shard.of(text)


@pytest.mark.parametrize("state", ["", ".part", ".done"])
def test_another_way_of_asking_is_refused(tmp_path, state):
    path = tmp_path / "p.jsonl"
    made(path, predictions(2))
    path.rename(f"{path}{state}")
    other = MANIFEST | {"decoding": {"max_new_tokens": 20}}
    with pytest.raises(UserError, match=r'decoding \{"max_new_tokens": 10\}.*\{"max_new_tokens": 20\}.*--overwrite'):
        Part(path, other)
    anew = Part(path, other, overwrite=True)
    assert not anew.done
    assert not anew.complete


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1"),
        ("[]\n", "line 1"),
        ('{"id": "a", "reply": "b"}\n', "line 1.*manifest"),
        ('{"manifest": {}}\n{"id": "a", "reply"', "line 2: not JSON"),
        ('{"manifest": {}}\n{"id": 3, "reply": "x"}\n', "line 2: id must be a string"),
        ('{"manifest": {}}\n{"id": "a", "reply": null}\n', "line 2: reply must be a string"),
        ('{"manifest": {}}\n{"id": "a", "reply": "", "answer": 1}\n', "line 2: unknown field answer"),
        ('{"manifest": {}}\n{"id": "a", "reply": "", "reference": []}\n', "line 2: reference must be an object"),
        ('{"manifest": {}}\n{"id": "a", "reply": ""}\n{"id": "a", "reply": ""}\n', "line 3: a is there twice"),
        (None, "no such file"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, problem):
    path = tmp_path / "p.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_predictions(path)


def test_pictures_are_kept_once(tmp_path):
    pictures = Pictures(tmp_path / "p.jsonl")
    names = {pictures.name(content) for content in (b"one", b"two", b"one")}
    assert len(names) == 2
    assert sorted((tmp_path / name).read_bytes() for name in names) == [b"one", b"two"]
    assert pictures.name(tmp_path / "x.png") == str(tmp_path / "x.png")
