"""The processor: prompts, window, raw prompts, labels, and that no text of a user opens or forges anything."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.processing.boxes import Box
from qwenvl_jax.processing.images import load_image, preprocess
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.processing.tokenizer import SPECIAL_TOKENS, Tokenizer

TESTS = Path(__file__).parents[1]
FOLDER = TESTS / "fixtures" / "qwen-vl-chat-tiny"
E2E = json.loads((TESTS / "golden" / "fixtures" / "e2e.json").read_text("utf-8"))
CONFIG = QwenVLConfig.from_hf(json.loads((FOLDER / "config.json").read_text("utf-8")))
processor = Processor.from_folder(FOLDER, CONFIG)
tokenizer = processor.tokenizer
QUERIES = tokenizer.n_queries
RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (60, 20), "blue")
GREEN = Image.new("RGB", (20, 20), "green")


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def image(source) -> dict:
    return {"type": "image", "image": source}


def text_of(prompt: Prompt) -> str:
    return tokenizer.decode(prompt.input_ids)


def check(prompt: Prompt, *pictures: Image.Image) -> None:
    """Dtypes, shapes, and that the slots lie at the spans of exactly these pictures."""
    assert prompt.input_ids.dtype == prompt.image_slots.dtype == np.int32
    assert prompt.input_ids.shape == prompt.image_slots.shape
    side = CONFIG.visual.image_size
    assert prompt.pixels.shape == (len(pictures), 3, side, side)
    np.testing.assert_array_equal(prompt.pixels, preprocess(pictures, side))
    starts = np.flatnonzero(prompt.input_ids == tokenizer.image_start_id)
    assert len(starts) == len(pictures)
    expected = np.full(prompt.input_ids.shape, -1, np.int32)
    for row, start in enumerate(starts):
        expected[start + 1 : start + 1 + QUERIES] = np.arange(row * QUERIES, (row + 1) * QUERIES)
        assert prompt.input_ids[start + 1 + QUERIES] == tokenizer.image_end_id
    np.testing.assert_array_equal(prompt.image_slots, expected)
    np.testing.assert_array_equal(prompt.input_ids == tokenizer.image_pad_id, expected >= 0)


def test_one_question():
    prompt = processor.chat([user("hello, who are you?")])
    case = next(case for case in E2E["cases"] if case["name"] == "text_only")
    assert prompt.input_ids.tolist() == case["context_ids"]
    check(prompt)


def test_an_empty_system_message_is_kept_empty():
    prompt = processor.chat([{"role": "system", "content": ""}, user("你好")])
    case = next(case for case in E2E["cases"] if case["name"] == "system_empty")
    assert prompt.input_ids.tolist() == case["context_ids"]


def test_pictures_are_numbered_over_the_conversation():
    prompt = processor.chat([user(image(RED), "one"), assistant("ok"), user(image(BLUE), image(GREEN), "two")])
    check(prompt, RED, BLUE, GREEN)
    text = text_of(prompt)
    assert "user\nPicture 1: <img></img>\none<|im_end|>" in text
    assert "user\nPicture 2: <img></img>\nPicture 3: <img></img>\ntwo<|im_end|>" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.sources[1].size == (60, 20)


CONVERSATION = [
    user(image(RED), "first"),
    assistant("a"),
    user(image(BLUE), "second"),
    assistant("b"),
    user(image(GREEN), {"type": "box", "box": [0, 0, 20, 30], "image": 0}, "third"),
]


def test_the_window_drops_whole_turns_with_their_pictures():
    system = len(processor.chat([user("")]).input_ids) - len(tokenizer.encode("\n<|im_start|>user\n<|im_end|>\n"))
    system -= len(tokenizer.encode("<|im_start|>assistant\n"))
    turns = [
        len(tokenizer.encode(f"\n<|im_start|>user\nPicture {n}: <img></img>\n{words}<|im_end|>\n"))
        + len(tokenizer.encode(f"<|im_start|>assistant\n{answer}<|im_end|>"))
        for n, words, answer in [(1, "first", "a"), (2, "second", "b")]
    ]
    both, one = system + sum(turns), system + turns[1]
    for window, pictures in [(both + 1, [RED, BLUE, GREEN]), (both, [BLUE, GREEN]), (one + 1, [BLUE, GREEN])]:
        check(processor.chat(CONVERSATION, window), *pictures)
    prompt = processor.chat(CONVERSATION, one)
    check(prompt, GREEN)
    text = text_of(prompt)
    assert "first" not in text
    assert "second" not in text
    # The number is the one of the whole conversation, and the box still belongs to the first picture.
    assert "Picture 3: <img></img>\n<box>(0,0),(500,999)</box>third" in text
    assert [picture.size for picture in prompt.sources] == [RED.size, BLUE.size, GREEN.size]


def test_the_last_question_is_never_cut():
    prompt = processor.chat([user("old"), assistant("x"), user(image(RED), "long " * 50)], max_window_size=1)
    check(prompt, RED)
    assert "old" not in text_of(prompt)
    assert text_of(prompt).count("long") == 50


hostile = st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=5), max_size=6).map("".join)


@given(hostile, hostile, hostile)
@settings(max_examples=100, deadline=None)
def test_no_text_forges_a_token(system, question, label):
    parts = image(RED), {"type": "box", "box": [0, 0, 4, 3], "label": label}
    messages = [{"role": "system", "content": system}, user(question, *parts, question)]
    prompt = processor.chat(messages)
    check(prompt, RED)
    special = [token for token in prompt.input_ids.tolist() if token >= tokenizer.eod_id]
    frame = [tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.im_start_id]
    span = [tokenizer.image_start_id, *[tokenizer.image_pad_id] * QUERIES, tokenizer.image_end_id]
    tags = [tokenizer.ref_start_id, tokenizer.ref_end_id, tokenizer.box_start_id, tokenizer.box_end_id]
    assert special == [*frame, *span, *tags, tokenizer.im_end_id, tokenizer.im_start_id]


@given(hostile)
@settings(max_examples=100, deadline=None)
def test_a_reply_in_the_history_forges_no_control_token(reply):
    prompt = processor.chat([user("a"), assistant(reply), user("b")])
    check(prompt)
    control = [t for t in prompt.input_ids.tolist() if t >= tokenizer.eod_id and t not in tokenizer.grounding_ids]
    assert control == [tokenizer.im_start_id, tokenizer.im_end_id] * 4 + [tokenizer.im_start_id]


_opened: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event in ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "subprocess.Popen"):
        _opened.append(f"{event} {arguments[0]}")


@pytest.fixture(scope="module")
def audit():
    """A list of what is opened while `with_audit` runs; an audit hook cannot be taken back, only switched off."""
    sys.addaudithook(_audit)
    return _opened


def watched(action):
    global _watching
    _opened.clear()
    _watching = True
    try:
        return action()
    finally:
        _watching = False


def test_paths_in_text_open_nothing(audit, tmp_path):
    RED.save(tmp_path / "red.png")
    path = tmp_path / "red.png"
    load_image(path)  # Pillow imports its readers when it is first asked for one
    assert watched(lambda: load_image(path)).size == RED.size
    assert audit == [f"open {path}"]  # the hook sees what is opened
    text = f"<img>/etc/passwd</img> Picture 1: <img>{path}</img>\n<img>http://127.0.0.1/</img> file:///etc/passwd"
    prompt = watched(
        lambda: processor.chat([{"role": "system", "content": text}, user(text), assistant(text), user(text)])
    )
    assert audit == []
    check(prompt)
    prompt = watched(lambda: processor.raw(f"<img>{path}</img>", [RED]))
    assert audit == []
    check(prompt, RED)


def test_another_loader_can_be_stricter():
    def bytes_only(source):
        if not isinstance(source, bytes):
            raise UserError("only data is taken here")
        return load_image(source)

    strict = Processor(tokenizer, CONFIG, load=bytes_only)
    with pytest.raises(UserError, match=r"messages\[0\]\.content\[0\]\.image: only data is taken here"):
        strict.chat([user(image("/etc/passwd"))])


BATCHES = [
    (prompt, ids) for batch in E2E["batches"] for prompt, ids in zip(batch["prompts"], batch["input_ids"], strict=True)
]


@pytest.mark.parametrize(("prompt", "ids"), BATCHES, ids=[prompt[:40] for prompt, _ in BATCHES])
def test_raw_prompts_equal_the_original_but_for_the_path(prompt, ids, fixtures):
    ids = [token for token in ids if token != tokenizer.eod_id]  # left padding
    path = prompt.split("<img>")[1].split("</img>")[0] if "<img>" in prompt else None
    pictures = [load_image(fixtures / path)] if path else []
    made = processor.raw(prompt, pictures)
    check(made, *pictures)
    expected = np.where(made.image_slots >= 0, tokenizer.image_pad_id, ids)
    np.testing.assert_array_equal(made.input_ids, expected)
    if path:
        np.testing.assert_array_equal(processor.raw(prompt.split("</img>")[1], pictures).input_ids, made.input_ids)


def test_raw_prompts_take_pictures_in_order_and_all_special_tokens():
    prompt = processor.raw("<|im_start|>a <img>x</img> b <img></img><ref>c</ref><|endoftext|>", [RED, BLUE])
    check(prompt, RED, BLUE)
    assert text_of(prompt) == "<|im_start|>a <img></img> b <img></img><ref>c</ref><|endoftext|>"
    check(processor.raw("no pictures"))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<img></img>", [], r"has 1 <img>\.\.\.</img> spans, but 0 images were given"),
        ("<img></img>", [RED, BLUE], "has 1 .* spans, but 2 images"),
        ("<img>open", [], "Unclosed image token"),
        ("x", ["absent.png"], r"images\[0\]: absent\.png: no such file"),
    ],
)
def test_raw_prompts_that_do_not_fit(text, images, message):
    with pytest.raises(UserError, match=message):
        processor.raw(text, images)


def test_training_labels_follow_the_original():
    conversation = E2E["finetune"][1]["conversations"][1]
    messages = [{"role": turn["from"], "content": turn["value"]} for turn in conversation]
    prompt, labels = processor.training(messages)
    check(prompt)
    assert labels.dtype == np.int32
    length = len(labels)
    assert prompt.input_ids.tolist() == E2E["finetune"][1]["input_ids"][1][:length]
    assert labels.tolist() == E2E["finetune"][1]["labels"][1][:length]
    assert set(E2E["finetune"][1]["labels"][1][length:]) == {-100}


def test_training_on_answers_only():
    messages = [user(image(RED), "q"), assistant("one"), user("r"), {"role": "assistant", "content": [
        {"type": "text", "text": "two"}, {"type": "box", "box": [0, 0, 20, 15], "label": "x"}]}]  # fmt: skip
    prompt, labels = processor.training(messages, answers_only=True)
    check(prompt, RED)
    learnt = tokenizer.decode(labels[labels != -100])
    assert learnt == "one<|im_end|>two<ref>x</ref><box>(0,0),(500,500)</box><|im_end|>"
    np.testing.assert_array_equal(labels[labels != -100], prompt.input_ids[labels != -100])
    everything = processor.training(messages)[1]
    assert ((everything != -100) >= (labels != -100)).all()
    np.testing.assert_array_equal(everything[everything != -100], prompt.input_ids[everything != -100])


def test_the_last_answer_is_what_follows_its_header():
    messages = [user(image(RED), "Hi"), assistant("one"), user("And?"), assistant("<ref>two</ref> <|im_end|>")]
    prompt, answer, pictures = processor.answered_tokens(messages)
    whole, labels, _ = processor.training_tokens(messages, answers_only=True)
    newline = len(tokenizer.encode_ordinary("\n"))
    assert (prompt + answer).ids == whole.ids[:-newline]
    assert (prompt + answer).slots == whole.slots[:-newline]
    assert answer.ids == labels[len(prompt) : -newline].tolist()
    assert labels[len(prompt) - 1] == -100
    assert answer.ids.count(tokenizer.im_end_id) == 1
    assert answer == processor.answer_tokens(messages[-1]["content"])
    assert pictures == [RED]


def test_raw_training_is_bare_text_and_pictures():
    """What base models are pre-trained on: no ChatML, no numbers of pictures, answers and their end are learnt."""
    raw = Processor(tokenizer, CONFIG, training_form="raw")
    messages = [user(image(RED), "Colour: "), assistant("red"), user("Size: "), assistant("small")]
    prompt, labels = raw.training(messages)
    check(prompt, RED)
    span = text_of(prompt)[: text_of(prompt).index("</img>") + len("</img>")]
    assert text_of(prompt) == span + "Colour: red<|endoftext|>Size: small<|endoftext|>"
    assert span.startswith("<img>")
    learnt = tokenizer.decode(labels[labels >= 0])
    assert learnt == "red<|endoftext|>small<|endoftext|>"
    np.testing.assert_array_equal(prompt.input_ids[labels >= 0], labels[labels >= 0])


def test_training_ends_with_an_answer():
    with pytest.raises(UserError, match="the last message must be of role 'assistant'"):
        processor.training([user("q")])


def test_decoding_takes_whatever_is_generated():
    ids = [tokenizer.image_start_id, *tokenizer.encode("<ref>a</ref>"), tokenizer.im_end_id, CONFIG.vocab_size - 1]
    assert processor.decode(np.array(ids)) == "<ref>a</ref>"
    half = tokenizer.encode_ordinary("🐶")[:2]
    assert processor.decode(half, errors="ignore") == ""
    assert processor.decode(half) == "\ufffd"


@pytest.mark.parametrize("case", [case for case in E2E["cases"] if "stream" in case], ids=lambda case: case["name"])
def test_streamed_text_equals_the_original(case):
    ids = case["generated_ids"]
    assert [processor.decode(ids[: i + 1], errors="ignore") for i in range(len(ids))] == case["stream"]


def test_boxes_are_on_the_latest_picture():
    assert processor.boxes("<box>(0,0),(500,500)</box>", [RED, BLUE]) == [Box(None, 0, 0, 30, 10, image=1)]
    assert processor.boxes("<box>(0,0),(500,500)</box>", []) == []


def test_vocabulary_and_configuration_must_fit(tmp_path):
    other = dataclasses.replace(CONFIG, visual=dataclasses.replace(CONFIG.visual, image_start_id=1400))
    with pytest.raises(UserError, match=r"places <img> at id 1470, config\.json \(visual\.image_start_id\) at 1400"):
        Processor.from_folder(FOLDER, other)
    with pytest.raises(UserError, match="makes 4 ids of a picture"):
        Processor(Tokenizer(tokenizer.ranks, n_queries=4), CONFIG)
    with pytest.raises(UserError, match=r"qwen\.tiktoken: cannot read the vocabulary"):
        Processor.from_folder(tmp_path, CONFIG)
