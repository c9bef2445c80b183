"""The front door on the tiny checkpoints of tests/fixtures, against the original implementation's answers."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS
from PIL import Image

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.processing.boxes import Box
from qwenvl_jax.processing.images import load_image
from qwenvl_jax.processing.legacy import messages_from_query
from qwenvl_jax.vlm import Reply, Usage, _groups

FIXTURES = TESTS / "fixtures"
PACKAGE = Path(qwenvl_jax.__file__).parent
GOLDEN = json.loads((TESTS / "golden" / "fixtures" / "e2e.json").read_text("utf-8"))
NUMBERS = np.load(TESTS / "golden" / "fixtures" / "e2e.npz")
CASES = {case["name"]: case for case in GOLDEN["cases"]}
BATCHES = {batch["name"]: batch for batch in GOLDEN["batches"]}
# Not from the same messages: here pictures are numbered over the whole conversation, a user's text forges nothing, and
# a box part has one box. Their ids are tested all the same.
OTHER_PROMPTS = ("two_turns_two_images", "control_strings", "boxes_in_prompt")
LOGITS = 1e-3  # absolute: the reference itself is within 1e-4 of float64
FEATURES = 1e-4

PICTURE = {"type": "image", "image": str(FIXTURES / "images" / "shapes.png")}
QUESTION = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "这是什么"}]}]
HELLO = [{"role": "user", "content": "hello, who are you?"}]
GREEDY = {"temperature": 0, "max_new_tokens": 24}


@pytest.fixture(scope="module", params=["qwen-vl-chat-tiny", "qwen-vl-chat-tiny-safetensors"])
def each_vlm(request):
    return qwenvl_jax.load(FIXTURES / request.param, image_mode="reference")


@pytest.fixture(scope="module")
def vlm():
    return qwenvl_jax.load(FIXTURES / "qwen-vl-chat-tiny", image_mode="reference")


def pictures(vlm, ids: list[int]) -> list:
    """The pictures that the path bytes in a context's image spans name."""
    spans = np.flatnonzero(np.array(ids) == vlm.config.visual.image_start_id) + 1
    names = [bytes(ids[start : ids.index(vlm.processor.tokenizer.image_pad_id, start)]).decode() for start in spans]
    return [FIXTURES / name for name in names]


def messages_of(case: dict) -> list:
    return messages_from_query(case["query"], case["history"], case["system"], FIXTURES)


@pytest.mark.parametrize("name", CASES)
def test_prefill_logits(each_vlm, name):
    ids = CASES[name]["context_ids"]
    logits = each_vlm.logits(ids, pictures(each_vlm, ids))
    assert logits.shape == (1, len(ids), each_vlm.config.vocab_size)
    assert logits.dtype == np.float32
    expected = NUMBERS[f"{name}/logits"]
    np.testing.assert_allclose(logits[0, NUMBERS[f"{name}/logits_pos"]], expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in OTHER_PROMPTS])
def test_chat_gives_the_response_of_the_original(each_vlm, name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(each_vlm, "max_window_size", case["max_window_size"] or 6144)
    # The last id is either <|endoftext|>, forced after a stop word, or one that the original's response lacks.
    shown = case["generated_ids"][:-1]
    reply = each_vlm.chat(messages_of(case), temperature=0, max_new_tokens=len(shown))
    assert reply.text == case["response"]
    assert reply.finish_reason == ("stop" if shown[-1] == each_vlm.processor.tokenizer.im_end_id else "length")


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("stream")])
def test_a_stream_gives_the_text_of_the_original(each_vlm, name):
    case = CASES[name]
    options = {"temperature": 0, "max_new_tokens": len(case["generated_ids"])}
    pieces = list(each_vlm.stream(messages_of(case), **options))
    assert len(pieces) > 1
    assert "".join(pieces) == each_vlm.chat(messages_of(case), **options).text
    # The original's stream leaves out what is no UTF-8.
    assert "".join(pieces).replace("�", "") == case["stream"][-1].strip()


@pytest.mark.parametrize("name", BATCHES)
def test_raw_prompts_give_the_texts_of_the_original(each_vlm, name):
    batch = BATCHES[name]
    for prompt, expected, ids in zip(batch["prompts"], batch["texts"], batch["generated_ids"], strict=True):
        images = [FIXTURES / path for path in re.findall("<img>(.*?)</img>", prompt)]
        options = {key: batch[key] for key in ("max_new_tokens", "min_new_tokens")}
        reply = each_vlm.generate(prompt, images, temperature=0, **options)
        assert reply.text.strip() == expected
        eod = each_vlm.processor.tokenizer.eod_id
        assert reply.usage.completion_tokens == (ids.index(eod) + 1 if eod in ids else len(ids))


@pytest.mark.parametrize("case", GOLDEN["multiple_choice"], ids=lambda case: case["options"][0])
def test_scores_of_choices(each_vlm, case):
    images = [FIXTURES / path for path in re.findall("<img>(.*?)</img>", case["prompt"])]
    choices = [f" {option}" for option in case["options"]]
    mean = each_vlm.score(case["prompt"], choices, images, per_token=True)
    np.testing.assert_allclose(-mean, case["mean_nll"], atol=1e-4)
    assert np.argmax(mean) == case["prediction"]
    total = each_vlm.score(case["prompt"], choices, images)
    np.testing.assert_allclose(total, mean * case["target_lengths"], atol=1e-6)


@pytest.mark.parametrize("name", ["shapes.png", "alpha.png", "gray.jpg", "photo.jpg", "图形.png"])
def test_image_features(each_vlm, name):
    rgb = NUMBERS[f"image/{name}/rgb"]  # not the file: JPEG decoders differ
    features = each_vlm.encode_image(rgb)
    assert (features.shape, features.dtype) == ((256, 128), np.float32)
    np.testing.assert_allclose(features[::4], NUMBERS[f"image/{name}/features"], atol=FEATURES, rtol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_logits_of_left_and_right_padding(vlm, name):
    batch = BATCHES[name]
    ids, mask = np.array(batch["input_ids"]), np.array(batch["attention_mask"])
    images = [picture for row in ids.tolist() for picture in pictures(vlm, row)]
    logits = vlm.logits(ids, images, attention_mask=mask)
    np.testing.assert_allclose(logits[:, -1], NUMBERS[f"{name}/logits_last"], atol=LOGITS, rtol=0)
    # Row by row, without padding and with it on the right.
    rolled = [np.roll(row, -int(np.sum(valid == 0))) for row, valid in zip(ids, mask, strict=True)]
    right = vlm.logits(np.array(rolled), images, attention_mask=np.sort(mask, axis=1)[:, ::-1])
    for row, valid in enumerate(mask.sum(axis=1)):
        alone = vlm.logits(rolled[row][:valid], pictures(vlm, ids[row].tolist()))
        np.testing.assert_allclose(right[row, :valid], alone[0], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.8, "seed": 4}])
def test_a_batch_gives_the_replies_one_by_one(vlm, options):
    names = ["text_only", "one_image", "system_empty", "two_images", "multi_turn_3", "window_10", "system_custom"]
    conversations = [messages_of(CASES[name]) for name in names]
    together = vlm.batch(conversations, max_new_tokens=24, **options)
    for messages, reply in zip(conversations, together, strict=True):
        alone = vlm.chat(messages, max_new_tokens=24, **options)
        assert (reply.text, reply.finish_reason, reply.usage) == (alone.text, alone.finish_reason, alone.usage)
    assert vlm.batch([]) == []


def test_batches_are_made_of_prompts_of_one_bucket():
    groups = _groups([70, 5, 64, 4000, 128, 65, 9000, 9000], [()] * 8)
    assert sorted(row for group in groups for row in group) == list(range(8))
    assert groups == [[1, 2], [5, 0, 4], [3], [6], [7]]
    assert [len(group) for group in _groups([10] * 70, [()] * 70)] == [32, 32, 6]


def test_batches_keep_questions_about_one_picture_together():
    a, b = (b"a",), (b"b",)
    assert _groups([70, 66, 80, 65, 10], [a, b, a, b, a]) == [[4], [0, 2, 3, 1]]


def test_usage_counts_tokens(vlm):
    prompt = CASES["one_image"]["context_ids"]
    assert vlm.chat(QUESTION, **GREEDY).usage == Usage(len(prompt), 24, 256)
    stopped = CASES["system_custom"]
    assert vlm.chat(messages_of(stopped), **GREEDY).usage == Usage(len(stopped["context_ids"]), 4, 0)


def test_draws_repeat_with_the_seed(vlm):
    replies = {seed: vlm.chat(HELLO, temperature=1.0, top_p=1.0, max_new_tokens=24, seed=seed).text for seed in (0, 1)}
    assert vlm.chat(HELLO, temperature=1.0, top_p=1.0, max_new_tokens=24).text == replies[0]
    assert replies[0] != replies[1]


def test_stop_strings_end_chat_stream_and_batch(vlm):
    whole = vlm.chat(HELLO, **GREEDY).text
    assert whole.startswith("绿Rea English Ptext")
    reply = vlm.chat(HELLO, stop=["glish P", "nowhere"], **GREEDY)
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == ("绿Rea En", "stop", 4)
    pieces = list(vlm.stream(HELLO, stop="glish P", **GREEDY))
    assert "".join(pieces) == "绿Rea En"
    both = vlm.batch([HELLO, QUESTION], stop="glish P", **GREEDY)
    assert [reply.text for reply in both] == ["绿Rea En", vlm.chat(QUESTION, **GREEDY).text]
    assert vlm.chat(HELLO, stop_ids=CASES["text_only"]["generated_ids"][3:4], **GREEDY).text == "绿Rea English"


def test_a_stop_string_is_no_stop_before_the_least_length(vlm):
    assert len(vlm.chat(HELLO, stop="glish", min_new_tokens=10, **GREEDY).text) > len("绿Rea English")


def test_boxes_are_pixels_of_the_latest_picture(vlm):
    picture = load_image(FIXTURES / "images" / "shapes.png")
    boxes = vlm.processor.boxes("<ref>a dog</ref><box>(100,200),(500,1000)</box>", [picture])
    assert boxes == [Box("a dog", 21, 19, 105, 97)]
    reply = Reply("", boxes, "stop", Usage(1, 1, 1), [picture])
    assert reply.draw().size == picture.size
    assert np.any(np.asarray(reply.draw()) != np.asarray(picture))
    assert vlm.chat(QUESTION, **GREEDY).draw().size == picture.size
    with pytest.raises(UserError, match="no picture to draw on"):
        vlm.chat(HELLO, temperature=0, max_new_tokens=1).draw()


def test_defaults_come_from_the_generation_config(vlm):
    defaults = vlm.defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.max_new_tokens) == (1.0, 0.3, 0, 512)
    text = vlm.chat(HELLO, max_new_tokens=20).text
    assert text == vlm.chat(HELLO, max_new_tokens=20, temperature=1, top_p=0.3, seed=0).text


def test_threads_share_a_vlm(vlm):
    expected = vlm.chat(QUESTION, **GREEDY).text
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(vlm.chat, QUESTION, **GREEDY) for _ in range(3)]
        futures.append(pool.submit(lambda: "".join(vlm.stream(QUESTION, **GREEDY))))
    results = [future.result() for future in futures]
    assert [getattr(result, "text", result) for result in results] == [expected] * 4


def test_mistakes_in_a_call_are_named(vlm):
    with pytest.raises(UserError, match="unknown option 'max_tokens'; did you mean 'max_new_tokens'"):
        vlm.chat(HELLO, max_tokens=3)
    with pytest.raises(UserError, match="max_new_tokens 0 must be at least 1"):
        vlm.stream(HELLO, max_new_tokens=0)  # at once, not with the first piece
    with pytest.raises(UserError, match="no-such"):
        vlm.chat([{"role": "user", "content": [{"type": "image", "image": "no-such.png"}]}])
    with pytest.raises(UserError, match="conversation 1: "):
        vlm.batch([HELLO, []])
    with pytest.raises(UserError, match="prompt is empty"):
        vlm.generate("")
    with pytest.raises(UserError, match=r"choices\[1\] is empty"):
        vlm.score("a", [" b", ""])
    long = [{"role": "user", "content": "a b " * 3000}]
    with pytest.raises(UserError, match=r"prompt has \d+ tokens; the model has 2048 positions"):
        vlm.chat(long)


def test_mistakes_in_ids_are_named(vlm):
    start = vlm.config.visual.image_start_id
    with pytest.raises(UserError, match="0 to 1535"):
        vlm.logits([1, 1536])
    with pytest.raises(UserError, match="whole numbers"):
        vlm.logits([0.5])
    with pytest.raises(UserError, match="have 1 image spans, but 0 images"):
        vlm.logits([1, start, 2])
    with pytest.raises(UserError, match="row 0: the image span at 1 must hold exactly 256 ids"):
        vlm.logits([1, start, 2, start + 1], [Image.new("RGB", (4, 4))])
    with pytest.raises(UserError, match=r"attention_mask is \[1, 1\], input_ids \[1, 2\]"):
        vlm.logits([1, 2], attention_mask=np.ones((1, 1)))


def test_a_url_is_opened_only_when_allowed(vlm):
    with pytest.raises(UserError, match="allow_url"):
        vlm.chat([{"role": "user", "content": [{"type": "image", "image": "http://localhost:9/x.png"}]}])


def test_a_base_model_does_not_chat(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(FIXTURES / "qwen-vl-chat-tiny-safetensors", folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"chat_format": "raw", "do_sample": False}))
    base = qwenvl_jax.load(folder)
    for ask in (base.chat, base.stream, lambda messages: base.batch([messages])):
        with pytest.raises(UserError, match="generate"):
            ask(HELLO)
    reply = base.generate("Describe", [FIXTURES / "images" / "shapes.png"], max_new_tokens=3)
    assert reply.usage.image_tokens == 256
    (folder / "generation_config.json").write_text(json.dumps(settings | {"top_p": 7}))
    with pytest.raises(UserError, match=r"generation_config.json: top_p 7 must be at most 1"):
        qwenvl_jax.load(folder)


def test_mistakes_in_load_are_named(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        qwenvl_jax.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="image_mode 'fast'"):
        qwenvl_jax.load(FIXTURES / "qwen-vl-chat-tiny", image_mode="fast")
    with pytest.raises(UserError, match="dtype"):
        qwenvl_jax.load(FIXTURES / "qwen-vl-chat-tiny", dtype="int8")


def test_importing_the_package_loads_no_jax():
    code = "import sys, qwenvl_jax; assert 'load' in dir(qwenvl_jax); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = qwenvl_jax.lod


def test_the_examples_of_the_usage_page_run(tmp_path, monkeypatch):
    """In a folder that holds the example pictures and nothing else."""
    page = (TESTS.parent / "docs" / "usage.md").read_text(encoding="utf-8")
    shutil.copytree(PACKAGE / "assets" / "pictures", tmp_path / "qwenvl_jax" / "assets" / "pictures")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 8
    for block in blocks:
        exec(compile(block, "docs/usage.md", "exec"), names)
    assert (tmp_path / "boxes.png").is_file()
