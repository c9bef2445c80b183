"""Batches of records: every token and picture where it belongs, the same from any number of workers and processes."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.data import measure as measuring
from qwenvl_jax.data.measure import AllRecords, measure
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.record_batches import BatchRecipe, RecordBatches, record_batches
from qwenvl_jax.data.records import Record, open_records
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED
from qwenvl_jax.processing.tokenizer import Tokenizer

QUERIES = 4
RECIPE = BatchRecipe(max_length=160)


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer.from_file("qwenvl_jax/assets/tiny/qwen.tiktoken", QUERIES)
    vision = VisionConfig(
        image_size=8, patch_size=4, width=8, layers=1, heads=1, mlp_ratio=2.0, output_dim=128, n_queries=QUERIES,
        image_start_id=tokenizer.image_start_id,
    )  # fmt: skip
    config = QwenVLConfig(1024, 128, 1, 1, 64, vision)
    return Processor(tokenizer, config)


def record(number: int, pictures: int, words: int = 4) -> Record:
    shown = [np.full((3, 3, 3), (5 * number + i) % 256, np.uint8) for i in range(pictures)]
    asked = [{"type": "image", "image": picture} for picture in shown]
    messages = [
        {"role": "user", "content": [*asked, {"type": "text", "text": f"question {number}"}]},
        {"role": "assistant", "content": "blue " * words},
    ]
    return Record(messages, f"memory:{number + 1}")


def records(count: int) -> Mixture:
    return Mixture([[record(number, number % 4 % 3, 3 + number * 7 % 19) for number in range(count)]])


def contents(batches: RecordBatches, batch: dict, number: int) -> None:
    """Checks every record of a batch against what the processor says of it alone."""
    for row, indexes in enumerate(batches.plan[number][1]):
        targets = dict(zip(batch["target_positions"][row], batch["targets"][row], strict=True))
        trained = 0
        for group, index in enumerate(indexes, start=1):
            where = np.flatnonzero(batch["group"][row] == group)
            prompt, labels = batches.processor.training(batches.source[index].messages, batches.recipe.answers_only)
            assert np.array_equal(where, np.arange(where[0], where[0] + len(labels)))
            assert np.array_equal(batch["ids"][row, where], prompt.input_ids)
            assert np.array_equal(batch["positions"][row, where], np.arange(len(where)))
            slots = batch["slots"][row, where]
            assert np.array_equal(slots >= 0, prompt.image_slots >= 0)
            if len(prompt.pixels):
                pictures = slots[slots >= 0].reshape(-1, QUERIES)
                assert np.array_equal(pictures % QUERIES, np.tile(np.arange(QUERIES), (len(pictures), 1)))
                assert np.array_equal(batch["pixels"][pictures[:, 0] // QUERIES], prompt.pixels)
            learnt = 1 + np.flatnonzero(labels[1:] != IGNORED)
            assert [targets[where[place - 1]] for place in learnt] == labels[learnt].tolist()
            trained += len(learnt)
        assert np.sum(batch["targets"][row] != IGNORED) == trained
        assert not batch["ids"][row, batch["group"][row] == 0].any()


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "in buckets"])
@pytest.mark.parametrize("answers_only", [False, True])
def test_every_record_stands_whole_in_a_row(processor, packing, answers_only):
    recipe = dataclasses.replace(RECIPE, packing=packing, answers_only=answers_only)
    batches = RecordBatches(recipe, records(40), processor, rows=4, epochs=1)
    assert sum(batches.counts(number)["records"] for number in range(len(batches))) == 40
    shapes = set()
    for number in range(len(batches)):
        batch = batches[number]
        contents(batches, batch, number)
        counts = batches.counts(number)
        assert counts["padding"] == pytest.approx(np.mean(batch["group"] == 0))
        empty = np.mean(~batch["pixels"].any(axis=(1, 2, 3)))
        assert counts["picture_padding"] == pytest.approx(empty)
        assert counts["tokens"] == np.sum(batch["group"] > 0)
        shapes.add((batch["ids"].shape, batch["pixels"].shape))
    assert len(shapes) == 1 if packing else 1 < len(shapes) <= 4
    assert len(batches.where(0)) == batches.counts(0)["records"]
    assert set(batches.where(0)) <= {f"memory:{number}" for number in range(1, 41)}


def test_a_row_has_places_for_its_targets_alone(processor):
    """Four answers of a few tokens under long questions need one step of places where a row has hundreds of tokens."""
    asked = {"role": "user", "content": "blue " * 100}
    source = [Record([asked, {"role": "assistant", "content": "red"}], f"memory:{i + 1}") for i in range(4)]
    batches = RecordBatches(BatchRecipe(max_length=600), Mixture([source]), processor, rows=1, epochs=1)
    batch = batches[0]
    assert len(batches.plan[0][1][0]) == 4
    assert (batch["ids"].shape[1], batch["targets"].shape[1]) == (600, 64)
    contents(batches, batch, 0)


def test_processes_share_each_batch(processor):
    source = records(24)
    whole = RecordBatches(RECIPE, source, processor, rows=4, steps=5)
    parts = [RecordBatches(RECIPE, source, processor, rows=4, steps=5, process=i, processes=2) for i in range(2)]
    for number in range(5):
        batch, shares = whole[number], [part[number] for part in parts]
        for name, value in batch.items():
            assert np.array_equal(value, np.concatenate([share[name] for share in shares])), name
        assert len(shares[0]["ids"]) == 2
    with pytest.raises(UserError, match="4 rows does not divide among 3 processes"):
        RecordBatches(RECIPE, source, processor, rows=4, steps=5, processes=3)


@pytest.fixture(scope="module")
def read_by_workers(processor):
    """Batches 3 to 8 of two passes, made by two worker processes."""
    return list(itertools.islice(record_batches(some_batches(processor), first=3, workers=2), 5))


def some_batches(processor) -> RecordBatches:
    return RecordBatches(RECIPE, records(30), processor, rows=2, epochs=2)


def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(processor, read_by_workers):
    """From the middle of a pass on, whatever the number of workers."""
    undisturbed = list(record_batches(some_batches(processor), workers=0))
    assert len(undisturbed) == len(some_batches(processor)) > 8
    for found, expected in zip(read_by_workers, undisturbed[3:8], strict=True):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert list(record_batches(some_batches(processor), first=len(undisturbed), workers=0)) == []


def test_the_source_of_batches_pickles(processor):
    batches = some_batches(processor)
    again = pickle.loads(pickle.dumps(batches))
    assert np.array_equal(again[4]["ids"], batches[4]["ids"])


def test_a_long_record_is_cut_after_its_last_picture_or_left_out(processor):
    long, picture_late, short = record(1, 1, words=200), record(2, 0, words=200), record(3, 1)
    content = [{"type": "image", "image": np.zeros((2, 2, 3), np.uint8)}, {"type": "text", "text": "and this?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    picture_late = dataclasses.replace(picture_late, messages=[*picture_late.messages, *turns])
    source = [long, picture_late, short]

    cut = RecordBatches(dataclasses.replace(RECIPE, packing=False), Mixture([source]), processor, rows=1, epochs=1)
    assert cut.cut == 1
    assert [reason.partition(":")[0] for reason in cut.skipped] == ["memory"]
    assert "memory:3" in cut.skipped[0]
    assert "cuts a picture" in cut.skipped[0]
    number = next(i for i in range(len(cut)) if cut.where(i) == ["memory:2"])
    batch = cut[number]
    prompt, labels = processor.training(long.messages)
    assert batch["ids"][0].tolist() == prompt.input_ids[:160].tolist()
    assert batch["targets"][0, batch["target_positions"][0] == 158].tolist() == [labels[159]]
    assert np.sum(batch["slots"] >= 0) == QUERIES

    skipping = RecordBatches(
        dataclasses.replace(RECIPE, too_long="skip"), Mixture([source]), processor, rows=1, epochs=1
    )
    assert skipping.cut == 0
    assert [reason.split(":")[1] for reason in skipping.skipped] == ["2", "3"]
    assert "more than max_length 160" in skipping.skipped[0]
    with pytest.raises(UserError, match="none of the 3 records can be trained on; the first: memory:2"):
        RecordBatches(BatchRecipe(max_length=20), Mixture([source]), processor, rows=1, epochs=1)


def test_needed_tokens_reach_to_the_last_picture_and_the_first_answer(processor):
    one = record(5, 2)
    measures = measure([one], processor)
    tokens, pictures, needed = (int(values[0]) for values in (measures.tokens, measures.pictures, measures.needed))
    prompt, _ = processor.training(one.messages)
    _, labels = processor.training(one.messages, answers_only=True)
    assert (tokens, pictures) == (len(prompt.input_ids), 2)
    assert labels[needed - 1] != IGNORED
    assert set(labels[: needed - 1]) == {IGNORED}


def test_bad_records_end_the_run_or_are_left_out(processor):
    bad = Record([{"role": "user", "content": "no answer"}], "memory:99")
    source = [record(0, 1), bad, *[dataclasses.replace(bad, where=f"memory:{n}") for n in range(100, 106)]]
    with pytest.raises(UserError, match=r"7 records.*bad_records: skip.*memory:99: messages\[0\]\.role.*and 2 more"):
        RecordBatches(RECIPE, Mixture([source]), processor, rows=1, epochs=1)
    batches = RecordBatches(
        dataclasses.replace(RECIPE, bad_records="skip"), Mixture([source]), processor, rows=1, epochs=1
    )
    assert batches.where(0) == ["memory:1"]
    assert len(batches.skipped) == 7


def test_more_pictures_than_a_batch_has_slots(processor):
    source = [record(0, 1), record(1, 2)]
    batches = RecordBatches(dataclasses.replace(RECIPE, pictures=1), Mixture([source]), processor, rows=1, epochs=1)
    assert batches.skipped == ["memory:2: has 2 pictures, more than the 1 of a batch"]
    assert batches[0]["pixels"].shape[0] == 1


def test_a_record_that_changes_during_the_run_is_named(processor):
    source = records(3).sources[0]
    batches = RecordBatches(RECIPE, Mixture([source]), processor, rows=1, epochs=1)
    source[1] = record(1, 1, words=99)
    with pytest.raises(UserError, match="memory:2: has changed"):
        list(record_batches(batches, workers=0))


class Counted:
    """A way to load pictures that counts them."""

    def __init__(self, load):
        self.load, self.count = load, 0

    def __call__(self, source):
        self.count += 1
        return self.load(source)


def test_measures_are_remembered_until_a_record_or_picture_changes(processor, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def of_file(name: str, answer: str) -> Record:
        content = [{"type": "image", "image": str(tmp_path / name)}, {"type": "text", "text": "what?"}]
        return Record([{"role": "user", "content": content}, {"role": "assistant", "content": answer}], name)

    counting = Processor(processor.tokenizer, processor.config, load=Counted(processor.load))

    def measured(source) -> tuple[list[int], int]:
        counting.load.count = 0
        found = measure(source, counting, cache=tmp_path / "run" / "measures.npz")
        return found.tokens.tolist(), counting.load.count

    source = [of_file("a.png", "red"), of_file("b.png", "blue")]
    tokens, loaded = measured(source)
    assert loaded == 2
    assert measured(source) == (tokens, 0)
    Image.new("RGB", (5, 5)).save(tmp_path / "b.png")
    assert measured(source) == (tokens, 1)
    source[0] = of_file("a.png", "red red red red red red")
    longer, loaded = measured(source)
    assert longer[0] > tokens[0]
    assert loaded == 1
    file = tmp_path / "run" / "measures.npz"
    file.write_bytes(file.read_bytes()[:-30])
    assert measured(source) == (longer, 2)
    (tmp_path / "a.png").unlink()
    missing = measure(source, counting, cache=tmp_path / "run" / "measures.npz")
    assert missing.tokens.tolist()[0] == 0
    assert "a.png" in missing.problems[0]


def test_sources_are_mixed_by_weight(processor):
    """A source of a larger weight comes round more often, and measures hold for each record wherever it comes from."""
    few, many = [record(number, 1) for number in range(3)], [record(number, 0, 9) for number in range(10, 31)]
    batches = RecordBatches(RECIPE, Mixture([few, many], [1.0, 1.0]), processor, rows=2, epochs=2)
    seen = [place for number in range(len(batches)) for place in batches.where(number)]
    assert len(seen) == 48
    assert sum(int(place.split(":")[1]) <= 3 for place in seen) == 24
    assert {seen.count(f"memory:{number}") for number in (1, 2, 3)} == {8}
    for number in range(len(batches)):
        contents(batches, batches[number], number)
    both = AllRecords([few, many])
    assert both[3].where == "memory:11"
    with pytest.raises(IndexError):
        both[24]


def test_workers_measure_the_same(processor, monkeypatch):
    bad = Record([{"role": "user", "content": "no answer"}], "memory:99")
    source = [*records(90).sources[0], bad]
    alone = measure(source, processor)
    monkeypatch.setattr(measuring, "FEW", 10)
    shared = measure(source, processor, workers=1)
    for field in ("tokens", "pictures", "needed"):
        assert np.array_equal(getattr(shared, field), getattr(alone, field))
    assert shared.problems == alone.problems
    assert list(alone.problems) == [90]


def test_records_of_a_file_become_batches(processor, tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "red.png")
    rows = [
        {"from": "user", "value": "Picture 1: <img>red.png</img>\nWhat colour?"},
        {"from": "assistant", "value": "<ref>red</ref><box>(0,0),(1000,1000)</box>"},
    ]
    path = tmp_path / "mine.jsonl"
    lines = [{"id": str(number), "conversations": rows} for number in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = Mixture([open_records(str(path))])
    batches = RecordBatches(RECIPE, mixture, processor, rows=1, epochs=1, cache=tmp_path / "measures.npz")
    assert sorted(place for number in range(len(batches)) for place in batches.where(number)) == [
        f"{path}:{line}" for line in (1, 2, 3)
    ]
    contents(batches, pickle.loads(pickle.dumps(batches))[0], 0)
    lines[1]["conversations"][1]["value"] = ""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"mine.jsonl:\d: conversations\[1\].value: the answer is empty"):
        RecordBatches(RECIPE, Mixture([open_records(str(path))]), processor, rows=1, epochs=1)
