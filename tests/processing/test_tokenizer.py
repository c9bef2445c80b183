"""The tokenizer against the original's golden values, with the fixture's vocabulary and, where found, the real one."""

import base64
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.tokenizer import GROUNDING_TAGS, IMAGE_TAGS, LONGEST_BLANK_RUN, SPECIAL_TOKENS, Tokenizer

TESTS = Path(__file__).parents[1]
VOCABULARY = TESTS / "fixtures" / "qwen-vl-chat-tiny" / "qwen.tiktoken"
E2E = json.loads((TESTS / "golden" / "fixtures" / "e2e.json").read_text("utf-8"))
REAL = json.loads((TESTS / "golden" / "tokenizer_golden.json").read_text("utf-8"))
BYTES = {bytes([byte]): byte for byte in range(256)}
small = Tokenizer.from_file(VOCABULARY)


@pytest.fixture(scope="session")
def real(real_vocabulary) -> Tokenizer:
    return Tokenizer.from_file(real_vocabulary)


def test_special_ids_of_the_fixture():
    assert {name: small.special_tokens[name] for name in E2E["special_ids"]} == E2E["special_ids"]
    assert small.n_vocab == E2E["n_vocab"]
    assert (small.eod_id, small.im_start_id, small.im_end_id) == (1256, 1257, 1258)
    assert (small.image_start_id, small.image_end_id, small.image_pad_id) == (1470, 1471, 1472)


def test_special_ids_of_the_real_vocabulary(real):
    assert {name: real.special_tokens[name] for name in REAL["special_tokens"]} == REAL["special_tokens"]
    assert real.n_vocab == REAL["n_vocab"] == 151860
    assert (real.ref_start_id, real.ref_end_id) == (151851, 151852)
    assert (real.box_start_id, real.box_end_id, real.quad_start_id, real.quad_end_id) == (
        151853,
        151854,
        151855,
        151856,
    )


def check_decodings(tokenizer: Tokenizer, ids: list[int], case: dict) -> None:
    assert tokenizer.decode(ids) == case["decode"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip"]
    assert tokenizer.decode(ids, skip_special_tokens=True, keep_image_special=True) == case["decode_skip_keep_image"]


@pytest.mark.parametrize("case", E2E["tokenizer"], ids=lambda case: case["text"][:20])
def test_encode_and_decode_of_the_fixture(case):
    assert small.encode(case["text"]) == case["ids"]
    assert small.encode(case["text"], allowed_special={*GROUNDING_TAGS, *IMAGE_TAGS}) == case["ids_image_special_only"]
    check_decodings(small, case["ids"], case)


@pytest.mark.parametrize("case", REAL["encode"], ids=lambda case: case["text"][:20])
def test_encode_and_decode_of_the_real_vocabulary(real, case):
    assert real.encode(case["text"]) == case["ids_all_special"]
    if case["ids_image_special_only"] is not None:
        ids = real.encode(case["text"], allowed_special=(*GROUNDING_TAGS, *IMAGE_TAGS))
        assert ids == case["ids_image_special_only"]
    check_decodings(real, case["ids_all_special"], case)


def test_errors_of_the_real_vocabulary(real):
    too_long, unclosed, full = REAL["errors"]
    for case in (too_long, unclosed):
        with pytest.raises(ValueError, match=case["msg"].replace(".", r"\.")):
            real.encode(case["text"])
    ids = [real.image_start_id, *[97] * 256, real.image_end_id]
    with pytest.raises(ValueError, match=full["msg"]):
        real.decode(ids)


def test_stop_words_of_the_real_vocabulary(real):
    assert [real.encode("Human:"), [real.eod_id]] == REAL["stop_words_ids"]["raw"]
    assert [[real.im_end_id], [real.im_start_id]] == REAL["stop_words_ids"]["chatml"]


@pytest.mark.parametrize("case", E2E["cases"], ids=lambda case: case["name"])
def test_decoding_a_stream(case):
    if "stream" not in case:
        assert small.decode(case["context_ids"]) == case["decoded_context"]
        return
    for count, text in enumerate(case["stream"], start=1):
        piece = small.decode(
            case["generated_ids"][:count], skip_special_tokens=True, errors="ignore", keep_image_special=True
        )
        assert piece == text


def test_a_smaller_number_of_queries_changes_the_span():
    tokenizer = Tokenizer.from_file(VOCABULARY, n_queries=9)
    pads = [tokenizer.image_pad_id] * 4
    assert tokenizer.encode("<img>a.png</img>") == [tokenizer.image_start_id, *b"a.png", *pads, tokenizer.image_end_id]
    with pytest.raises(UserError, match="10 bytes, at most 9"):
        tokenizer.encode("<img>abcdef.png</img>")


def test_special_tokens_inside_a_span_are_refused():
    with pytest.raises(UserError, match=r"special token inside <img>"):
        small.encode("<img>a<ref>b</img>")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1470, 97], "Unclosed"),
        ([1470, 300, 1472, 1471], "not the bytes of a path"),
        ([1470, 255, 1472, 1471], "not the bytes of a path"),
        ([1473], "token id 1473 is not in the vocabulary"),
        ([-1], "token id -1 is not in the vocabulary"),
    ],
)
def test_ids_that_cannot_be_decoded(ids, message):
    with pytest.raises(UserError, match=message):
        small.decode(ids)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_ordinary_text_survives_and_holds_no_special_id(text):
    ids = small.encode_ordinary(text)
    assert all(0 <= token < small.eod_id for token in ids)
    assert small.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=4), max_size=6).map("".join))
@settings(max_examples=200, deadline=None)
def test_no_spelling_of_a_special_token_becomes_one_in_ordinary_text(text):
    assert all(token < small.eod_id for token in small.encode_ordinary(text))


def test_both_normal_forms_give_the_same_ids():
    assert small.encode_ordinary("e\u0301") == small.encode_ordinary("\u00e9") == small.encode("e\u0301")


def test_a_lone_surrogate_becomes_a_replacement_character():
    assert small.decode(small.encode_ordinary("a\ud800")) == "a\ufffd"


def test_endless_blanks_are_refused_before_they_reach_the_matcher():
    assert small.encode_ordinary("x" + " " * LONGEST_BLANK_RUN)
    for blank in (" ", "\u3000", "\n"):
        with pytest.raises(UserError, match="blanks in a row"):
            small.encode_ordinary(blank * (LONGEST_BLANK_RUN + 1))


def test_disallowed_special_tokens_raise():
    with pytest.raises(ValueError, match="im_start"):
        small.encode("<|im_start|>", allowed_special=set(), disallowed_special="all")


def test_saving_writes_the_same_vocabulary(tmp_path):
    small.save(tmp_path / "qwen.tiktoken")
    assert (tmp_path / "qwen.tiktoken").read_bytes() == VOCABULARY.read_bytes()
    assert Tokenizer.from_file(tmp_path / "qwen.tiktoken").ranks == small.ranks


def test_a_tokenizer_travels_to_worker_processes():
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode("hello <ref>") == small.encode("hello <ref>")


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (line(b"a", 0) + b"???? 1\n", "line 2: '.*' is not `base64-of-token rank`"),
        (line(b"a", 0) + b"YQ==\n", "line 2"),
        (line(b"a", 0) + b"Yg== one\n", "line 2"),
        (line(b"a", 0) + line(b"b", 0), r"line 2: rank 0 occurs again \(first in line 1\)"),
        (line(b"a", 0) + line(b"a", 1), r"line 2: token b'a' occurs again \(first as rank 0\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1: .*Git LFS"),
        (b"\x89PNG\r\n\x1a\n\0\0", "line 1: .*not a vocabulary"),
        (line(b"a", 0), "lacks 255 of the 256 single bytes"),
        (b"".join(line(token, rank + 1) for token, rank in BYTES.items()), "not the numbers 0 to 255"),
    ],
)
def test_a_broken_vocabulary_is_named(tmp_path, content, message):
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.tiktoken: cannot read the vocabulary"):
        Tokenizer.from_file(tmp_path / "absent.tiktoken")
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        Tokenizer.from_file(tmp_path)
