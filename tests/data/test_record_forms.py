"""The forms of rows: what becomes of each, that training gets the original's tokens, and what is refused by name."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.problems import RecordError
from qwenvl_jax.data.record_forms import read_row
from qwenvl_jax.processing import legacy
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.tokenizer import Tokenizer

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "fixtures"
FOLDER = FIXTURES / "qwen-vl-chat-tiny"
E2E = json.loads((TESTS / "golden" / "fixtures" / "e2e.json").read_text("utf-8"))
processor = Processor.from_folder(FOLDER, QwenVLConfig.from_hf(json.loads((FOLDER / "config.json").read_text("utf-8"))))
tokenizer = processor.tokenizer
SHAPES, PHOTO = "images/shapes.png", "images/photo.jpg"


def image(path: str) -> dict:
    return {"type": "image", "image": str(FIXTURES / path)}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def messages(row) -> list[dict]:
    return read_row(row, FIXTURES).messages


def turns(*values, names=("user", "assistant")) -> dict:
    return {"conversations": [{"from": names[i % 2], "value": value} for i, value in enumerate(values)]}


def chat(*contents) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def check_tokens(conversation, input_ids, labels, reader: Processor = processor) -> None:
    """Training reads these ids and labels, but for the path bytes in a picture's span, which it does not need."""
    prompt, own_labels = reader.training(conversation)
    count = len(own_labels)
    spans = prompt.image_slots >= 0
    np.testing.assert_array_equal(prompt.input_ids, np.where(spans, reader.tokenizer.image_pad_id, input_ids[:count]))
    assert own_labels.tolist() == list(labels[:count])
    assert all(token == reader.tokenizer.eod_id for token in input_ids[count:])


@pytest.mark.parametrize("case", E2E["finetune"][:2], ids=lambda case: str(case["max_len"]))
def test_rows_give_the_tokens_and_labels_of_the_original(case):
    for number, conversation in enumerate(case["conversations"]):
        check_tokens(messages({"conversations": conversation}), case["input_ids"][number], case["labels"][number])


def test_rows_give_the_tokens_of_the_released_vocabulary(real_vocabulary, tmp_path):
    visual = dataclasses.replace(processor.config.visual, image_start_id=151857)
    config = dataclasses.replace(processor.config, vocab_size=151936, visual=visual)
    released = Processor(Tokenizer.from_file(real_vocabulary), config)
    case = json.loads((TESTS / "golden" / "tokenizer_golden.json").read_text("utf-8"))["finetune_preprocess"]
    (tmp_path / "a.png").write_bytes((FIXTURES / SHAPES).read_bytes())
    for number, conversation in enumerate(case["conversations"]):
        row = read_row({"conversations": conversation}, tmp_path)
        check_tokens(row.messages, case["input_ids"][number], case["labels"][number], released)


numbers = st.integers(0, 499), st.integers(500, 999)  # a left or top edge, a right or bottom one
points = st.tuples(numbers[0], numbers[0], numbers[1], numbers[1])
words = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), max_size=12)
notation = st.one_of(
    words,
    words.map("<ref>{}</ref>".format),
    points.map(lambda p: f"<box>({p[0]},{p[1]}),({p[2]},{p[3]})</box>"),
    points.map(lambda p: f"<ref>a dog</ref><box>({p[0]},{p[1]}),({p[2]},{p[3]})</box>"),
    points.map(lambda p: f"<ref>狗</ref><quad>({p[0]},{p[1]}),({p[2]},{p[1]}),({p[2]},{p[3]}),({p[0]},{p[3]})</quad>"),
)
talk = st.lists(notation, min_size=1, max_size=4).map("".join)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(talk, talk), min_size=1, max_size=3), st.sampled_from([SHAPES, PHOTO]))
def test_any_notation_gives_the_tokens_of_the_original(conversation, path):
    values = [value for turn in conversation for value in turn]
    values[0] = f"Picture 1: <img>{path}</img>\n{values[0]}"
    row = turns(*values)
    whole = legacy.finetune_preprocess(tokenizer, [row["conversations"]], 2000)
    assert whole["input_ids"][0, -1] == tokenizer.eod_id, "the row was cut"
    check_tokens(messages(row), whole["input_ids"][0], whole["labels"][0])


def test_sharegpt():
    row = turns("hi", "hello", "more", "less", names=("human", "gpt")) | {"system": "Be brief.", "id": 7}
    assert messages(row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("hi")]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [text("more")]},
        {"role": "assistant", "content": "less"},
    ]
    first_turn = {"from": "system", "value": "Be brief."}
    as_turn = {"conversations": [first_turn, *row["conversations"]]}
    assert messages(as_turn) == messages(row)
    assert read_row(as_turn, FIXTURES).fields == [f"conversations[{i}].value" for i in range(5)]


@pytest.mark.parametrize("images", [{"image": SHAPES}, {"images": [SHAPES]}], ids=["image", "images"])
def test_llava(images):
    row = turns("<image>\nWhat is it?", "shapes", names=("human", "gpt")) | images
    expected = [
        {"role": "user", "content": [image(SHAPES), text("What is it?")]},
        {"role": "assistant", "content": "shapes"},
    ]
    assert messages(row) == expected
    original = turns(f"Picture 1: <img>{SHAPES}</img>\nWhat is it?", "shapes")
    assert messages(original) == expected


def test_placeholders_take_the_pictures_in_their_order():
    row = turns("Compare Picture 1: <image>\nwith <image>", "same", "and <image>?", "no")
    found = messages(row | {"images": [SHAPES, PHOTO, "images/gray.jpg"]})
    assert found[0]["content"] == [text("Compare "), image(SHAPES), text("with "), image(PHOTO)]
    assert found[2]["content"] == [text("and "), image("images/gray.jpg"), text("?")]


def test_a_box_belongs_to_the_picture_before_it_wherever_that_was_named():
    row = turns("<image>\n<image>\nWhat is in <box>(0,0),(500,1000)</box>?", "x") | {"images": [PHOTO, SHAPES]}
    assert messages(row)[0]["content"][3] == {"type": "box", "box": [0, 0, 105.5, 97], "label": None}


def test_openai():
    parts = [
        {"type": "image_url", "image_url": {"url": SHAPES, "detail": "low"}},
        {"type": "text", "text": "What is <ref>it</ref>, <image>?"},
        {"type": "image_url", "image_url": {"url": "file:///pictures/a%20b.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,xyz"}},
    ]
    found = messages(chat(parts, [{"type": "text", "text": "a shape"}]))
    sources = [str(FIXTURES / SHAPES), "/pictures/a b.png", "data:image/png;base64,xyz"]
    assert [part["image"] for part in found[0]["content"] if part["type"] == "image"] == sources
    assert found[0]["content"][1] == parts[1], "text of a part is text, whatever it looks like"
    developer = {"messages": [{"role": "developer", "content": "Be brief."}, *chat("a", "b")["messages"]]}
    assert messages(developer)[0] == {"role": "system", "content": "Be brief."}


def test_strings_of_messages_hold_no_notation_but_placeholders():
    found = messages(chat("<image>look at <ref>it</ref> <img>/etc/passwd</img>", "no") | {"image": SHAPES})
    assert found[0]["content"] == [image(SHAPES), text("look at <ref>it</ref> <img>/etc/passwd</img>")]


def test_parts_as_tables_keep_them():
    """Every column in every part, bytes in a structure, and pictures beside the messages."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    row = chat(parts, [{"type": "text", "text": "x"}]) | {"images": [{"bytes": b"png", "path": "a.png"}]}
    assert messages(row)[0]["content"] == [{"type": "image", "image": b"png"}, text("What?")]
    row["images"] = [{"bytes": None, "path": SHAPES}]
    assert messages(row)[0]["content"][0] == image(SHAPES)


def test_a_dictionary_of_lists_is_a_list_of_dictionaries():
    row = {"conversations": {"from": ["human", "gpt"], "value": ["hi", "hello"]}}
    assert messages(row) == messages(turns("hi", "hello"))


def test_question_and_answer():
    row = {"image": SHAPES, "question": "What?", "answer": "a circle", "question_id": 3}
    assert messages(row) == [
        {"role": "user", "content": [image(SHAPES), text("What?")]},
        {"role": "assistant", "content": "a circle"},
    ]
    assert messages(row | {"question": "Here: <image>\nWhat?"})[0]["content"][0] == text("Here: ")


@pytest.mark.parametrize("rejected", ["no", {"from": "gpt", "value": "no"}, [{"role": "assistant", "content": "no"}]])
def test_rejected_answers(rejected):
    row = turns("Is it?", "yes") | {"rejected": rejected}
    assert read_row(row, FIXTURES).rejected == "no"
    assert read_row(chat("Is it?", "yes") | {"rejected_response": "no"}, FIXTURES).rejected == "no"
    chosen = turns("Is it?") | {"chosen": {"from": "gpt", "value": "yes"}, "rejected": rejected}
    read = read_row(chosen, FIXTURES)
    assert read.messages == messages(turns("Is it?", "yes"))
    assert read.fields[-1] == "chosen"


def test_paths():
    absolute = str(FIXTURES / SHAPES)
    for path in (absolute, f"file://{absolute}", SHAPES):
        assert messages(turns("<image>", "x") | {"image": path})[0]["content"] == [image(SHAPES)]
    for uri in ("https://host/a.png", "data:image/png;base64,xyz"):
        assert messages(turns(f"<img>{uri}</img>", "x"))[0]["content"] == [{"type": "image", "image": uri}]


REFUSED = [
    ([1], "", "a list, not an object"),
    ({"id": 1}, "", "has the fields id"),
    (turns("a"), "conversations[0].value", "the last turn is the user's"),
    (turns("a", "b") | {"conversations": "text"}, "conversations", "a string, not a list"),
    ({"conversations": []}, "conversations", "empty"),
    ({"conversations": ["a"]}, "conversations[0]", "a string, not an object"),
    ({"conversations": [{"from": "user"}]}, "conversations[0].value", "missing"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "missing"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, "conversations[0].from", "unknown role 'bot'"),
    ({"conversations": [{"from": ["x"], "value": "a"}]}, "conversations[0].from", "unknown role"),
    (turns("a", 3), "conversations[1].value", "a number, not a text"),
    (turns("a", "b", names=("user", "user")), "conversations[1].from", "'user' where 'assistant' is expected"),
    ({"messages": chat("a", "b")["messages"][1:]}, "messages[0].role", "'assistant' where 'user' is expected"),
    ({"conversations": [{"from": "system", "value": "a"}]}, "conversations[0].from", "no turn of the user's"),
    (chat("a", "b") | {"system": 3}, "system", "a number, not a text"),
    (turns("<image>", "b"), "conversations[0].value", "0 pictures, but 1 <image>"),
    (turns("a", "b") | {"image": SHAPES}, "image", "1 pictures, but 0 <image>"),
    (turns("<image>", "b") | {"images": [SHAPES, PHOTO]}, "images", "2 pictures, but 1 <image>"),
    (turns("<image>", "b") | {"images": [3]}, "images[0]", "3 is no picture"),
    (turns("<image>", "b") | {"images": [], "image": SHAPES}, "images", "beside 'image'"),
    (turns("<img></img>", "b"), "conversations[0].value", "'' is no picture"),
    (turns("<img>a", "b"), "conversations[0].value", "Unclosed <img>"),
    (turns("a", "<img>b</img>"), "conversations[1].value", "a picture in a turn of the assistant"),
    (turns("<box>(1,2),(3,4)</box>", "b"), "conversations[0].value", "no picture before it"),
    (turns(f"<img>{SHAPES}</img><box>(9,2),(3,4)</box>", "b"), "conversations[0].value", "turned round"),
    (turns(f"<img>{SHAPES}</img><box>(1,2),(3,1004)</box>", "b"), "conversations[0].value", "out of range"),
    (turns("<img>nowhere.png</img><box>(1,2),(3,4)</box>", "b"), "conversations[0].value", "nowhere.png: no such file"),
    (chat(["a"], "b"), "messages[0].content[0]", "a string, not an object"),
    (chat([{"type": "image_url", "image_url": "x"}], "b"), "messages[0].content[0].image_url", "has no 'url'"),
    (chat([{"type": "image", "image": 3}], "b"), "messages[0].content[0].image", "3 is no picture"),
    ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "messages[0]", "asks not to be learnt"),
    ({"question": "a"}, "answer", "missing"),
    (turns("a", "b") | {"chosen": "c"}, "chosen", "end with an answer already"),
    (turns("a", "b") | {"rejected": ["c", "d"]}, "rejected", "not one answer"),
    ({"conversations": {"from": ["user"], "value": []}}, "conversations", "lists of different lengths"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "field", "wrong"), REFUSED, ids=[f"{i}-{wrong[:20]}" for i, (*_, wrong) in enumerate(REFUSED)]
)
def test_what_is_refused(row, field, wrong):
    with pytest.raises(RecordError) as caught:
        messages(row)
    assert caught.value.problem.field == field
    assert wrong in caught.value.problem.wrong
    assert caught.value.problem.advice
