"""The original's string forms against its golden values, and their way into messages."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.processing import legacy
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.tokenizer import Tokenizer

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "fixtures"
FOLDER = FIXTURES / "qwen-vl-chat-tiny"
E2E = json.loads((TESTS / "golden" / "fixtures" / "e2e.json").read_text("utf-8"))
REAL = json.loads((TESTS / "golden" / "tokenizer_golden.json").read_text("utf-8"))
small = Tokenizer.from_file(FOLDER / "qwen.tiktoken")
by_name = pytest.mark.parametrize("case", E2E["cases"], ids=lambda case: case["name"])


@pytest.fixture(scope="session")
def real(real_vocabulary) -> Tokenizer:
    return Tokenizer.from_file(real_vocabulary)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(small, QwenVLConfig.from_hf(json.loads((FOLDER / "config.json").read_text("utf-8"))))


@pytest.mark.parametrize("case", REAL["from_list_format"], ids=lambda case: case["out"][:20])
def test_from_list_format(case):
    assert legacy.from_list_format(case["inp"]) == case["out"]


def test_from_list_format_refuses_other_elements():
    with pytest.raises(ValueError, match=r"needs 'image', 'text' or 'box', this one has \['ref'\]"):
        legacy.from_list_format([{"ref": "x"}])


@pytest.mark.parametrize("case", REAL["to_list_format"], ids=lambda case: case["inp"][:20])
def test_to_list_format(case):
    assert legacy.to_list_format(case["inp"]) == case["out"]
    boxes = [{"box": numbers} | ({} if label is None else {"ref": label}) for label, numbers in boxes_of(case["inp"])]
    assert boxes == case["boxes"]
    assert legacy.latest_picture(case["inp"]) == case["latest_picture"]


boxes_of = legacy.boxes_in_response


@pytest.mark.parametrize("text", ["<img>a", "x<ref>y", "<box>(1,2)", "<quad>"])
def test_to_list_format_refuses_unclosed_tags(text):
    with pytest.raises(ValueError, match="Unclosed"):
        legacy.to_list_format(text)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|extra_7|>"])
def test_to_list_format_refuses_control_tokens(token):
    with pytest.raises(ValueError, match="special token"):
        legacy.to_list_format(f"a{token}b")


@by_name
def test_contexts_of_the_fixture(case):
    if case["list_format"] is not None:
        assert legacy.from_list_format(case["list_format"]) == case["query"]
    window = case["max_window_size"] or 6144
    raw_text, ids = legacy.make_context(small, case["query"], case["history"], case["system"], window)
    assert raw_text == case["raw_text"]
    assert ids == case["context_ids"]
    assert small.decode(ids) == case["decoded_context"]


@by_name
def test_responses_of_the_fixture(case):
    ids = case["context_ids"] + case["generated_ids"]
    response = legacy.decode_tokens(small, ids, len(case["context_ids"]), len(case["raw_text"]))
    assert response == case["response"]


@pytest.mark.parametrize(
    "case", REAL["make_context"], ids=lambda case: f"{case['query'][:8]}-{case.get('max_window_size')}"
)
def test_contexts_of_the_real_vocabulary(real, case):
    options = {name: case[name] for name in ("system", "max_window_size", "chat_format") if name in case}
    raw_text, ids = legacy.make_context(real, case["query"], case["history"], **options)
    assert raw_text == case["raw_text"]
    assert ids == case["tokens"]


@pytest.mark.parametrize("case", REAL["decode_tokens_chatml"], ids=lambda case: case["response"] or "empty")
def test_responses_of_the_real_vocabulary(real, case):
    ids, context_length = case["prompt_tokens"] + case["generated"], len(case["prompt_tokens"])
    assert legacy.decode_tokens(real, ids, context_length, case["raw_text_len"]) == case["response"]


def test_a_response_of_nothing_is_empty():
    raw_text, ids = legacy.make_context(small, "x")
    assert legacy.decode_tokens(small, ids, len(ids), len(raw_text)) == ""


def test_an_unknown_chat_format_is_refused():
    with pytest.raises(UserError, match="chat_format 'llama' does not exist"):
        legacy.make_context(small, "x", chat_format="llama")


def check_rows(rows: dict[str, np.ndarray], case: dict) -> None:
    assert rows["input_ids"].tolist() == case["input_ids"]
    assert rows["labels"].tolist() == case["labels"]
    if "attention_mask" in case:
        assert rows["attention_mask"].astype(int).tolist() == case["attention_mask"]


@pytest.mark.parametrize("case", E2E["finetune"], ids=lambda case: str(case["max_len"]))
def test_fine_tuning_rows_of_the_fixture(case):
    check_rows(legacy.finetune_preprocess(small, case["conversations"], case["max_len"]), case)


def test_fine_tuning_rows_of_the_real_vocabulary(real):
    whole, cut = REAL["finetune_preprocess"], REAL["finetune_preprocess_truncated"]
    assert whole["pad_id"] == real.eod_id
    check_rows(legacy.finetune_preprocess(real, whole["conversations"], whole["max_len"]), whole)
    check_rows(legacy.finetune_preprocess(real, whole["conversations"], cut["max_len"]), cut)


def test_fine_tuning_names_a_wrong_role():
    with pytest.raises(UserError, match=r"conversations\[0\], turn 1: from is 'gpt'"):
        legacy.finetune_preprocess(small, [[{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]], 50)


@pytest.mark.parametrize("case", E2E["boxes"], ids=lambda case: case["response"][:30])
def test_boxes_on_the_latest_picture(case):
    response, history = case["response"], case["history"]
    if "raises" in case:
        expected = {"AssertionError": AssertionError, "ValueError": ValueError}[case["raises"]]
        with pytest.raises(expected):
            legacy.draw_boxes_on_latest_picture(response, history, FIXTURES)
        return
    assert legacy.to_list_format(response) == case["to_list_format"]
    assert [{"box": numbers, "ref": label} for label, numbers in boxes_of(response)] == case["boxes_norm"]
    assert legacy.latest_picture(response, history) == case["latest_picture"]
    drawn = legacy.draw_boxes_on_latest_picture(response, history, FIXTURES)
    assert (drawn is not None) == (case["returns"] == "image")
    if drawn is not None:
        assert list(drawn.size) == case["image_size"]
        boxes = [legacy.pixel_box(label, numbers, drawn.size) for label, numbers in boxes_of(response)]
        assert [{"pixels": [b.x1, b.y1, b.x2, b.y2], "ref": b.label} for b in boxes] == case["draw"]


# A tag that closes nothing counts in the original's prompt and is plain text in a message; everything else is equal.
FORGED = "control_strings"
# The original counts pictures anew in each query; messages count over the conversation.
RENUMBERED = "two_turns_two_images"


@by_name
def test_messages_give_the_prompt_of_the_original(case, processor):
    messages = legacy.messages_from_query(case["query"], case["history"], case["system"], FIXTURES)
    prompt = processor.chat(messages, case["max_window_size"] or 6144)
    expected = np.array(case["context_ids"])
    if case["name"] == FORGED:
        assert small.image_end_id in expected
        assert small.image_end_id not in prompt.input_ids
        assert small.decode(prompt.input_ids) == case["raw_text"]
        return
    if case["name"] == RENUMBERED:
        one, two = small.encode("12")
        second = np.flatnonzero(expected == small.image_start_id)[1]
        assert expected[second - 3] == one
        expected[second - 3] = two
    np.testing.assert_array_equal(prompt.input_ids, np.where(prompt.image_slots >= 0, small.image_pad_id, expected))
    spans = expected == small.image_start_id
    assert (prompt.image_slots >= 0).sum() == spans.sum() * small.n_queries
    assert len(prompt.pixels) == spans.sum()


def parts_of(text: str, pictures: list | None = None) -> list[dict]:
    return legacy.user_parts(text, lambda path: path, [] if pictures is None else pictures)


def test_parts_of_old_texts(monkeypatch):
    text = "look <img>a.png</img>\n\nat <ref>the dog</ref><box>(100,200),(300,400)</box> <ref>x</ref> "
    text += "<quad>(0,0),(500,0),(500,1000),(0,1000)</quad>Picture 2: <img>b.png</img>"
    with pytest.raises(UserError, match=r"a\.png: no such file"):
        parts_of(text)
    monkeypatch.chdir(FIXTURES)
    text = text.replace("a.png", "images/shapes.png").replace("b.png", "http://host/b.png")
    pictures: list[str] = []
    parts = parts_of(text, pictures)
    assert pictures == ["images/shapes.png", "http://host/b.png"]
    assert parts == [
        {"type": "text", "text": "look "},
        {"type": "image", "image": "images/shapes.png"},
        {"type": "text", "text": "\nat "},
        {"type": "box", "box": pytest.approx([21.1, 19.4, 63.3, 38.8]), "label": "the dog"},
        {"type": "text", "text": " "},
        {"type": "ref", "ref": "x"},
        {"type": "text", "text": " "},
        {"type": "quad", "quad": pytest.approx([0, 0, 105.5, 0, 105.5, 97, 0, 97]), "label": None},
        {"type": "image", "image": "http://host/b.png"},
    ]


def test_a_box_without_a_picture_is_refused():
    with pytest.raises(UserError, match="has no picture before it"):
        parts_of("<box>(1,2),(3,4)</box>")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("<box>(1,2),(3)</box>", "not of the form"),
        ("<box>(a,2),(3,4)</box>", "not of the form"),
        ("<quad>(1,2),(3,4)</quad>", "not of the form"),
        ("<box>(1,2),(3,1001)</box>", "out of range"),
        ("<box>(5,2),(3,4)</box>", "turned round"),
        ("<ref>x", "Unclosed <ref>"),
    ],
)
def test_a_box_that_cannot_be_read_is_refused(text, wrong):
    with pytest.raises(UserError, match=wrong):
        parts_of(text, [FIXTURES / "images" / "shapes.png"])
