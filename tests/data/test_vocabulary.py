"""The tiny vocabulary: shipped as trained, a valid byte-pair encoding, and short on the scenes' own texts."""

import base64
import collections
import importlib.resources
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiktoken

from qwenvl_jax.data.questions import as_parts, scene_questions
from qwenvl_jax.data.scenes import sample_scene
from qwenvl_jax.data.vocabulary import PATTERN, VOCABULARY_SIZE, train, write


def shipped() -> bytes:
    return importlib.resources.files("qwenvl_jax").joinpath("assets/tiny/qwen.tiktoken").read_bytes()


def read_ranks(data: bytes) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}


RANKS = read_ranks(shipped())
ENCODING = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={})


def test_the_module_writes_the_shipped_file_again(tmp_path):
    write(tmp_path / "qwen.tiktoken")
    assert (tmp_path / "qwen.tiktoken").read_bytes() == shipped()


def test_ranks_are_dense_and_begin_with_the_bytes_of_gpt2(fixtures):
    assert list(RANKS.values()) == list(range(VOCABULARY_SIZE))
    first = read_ranks((fixtures / "qwen-vl-chat-tiny" / "qwen.tiktoken").read_bytes())
    assert list(RANKS)[:256] == list(first)[:256]


def test_every_token_is_reached_by_merging_tokens_of_lower_rank():
    for token, rank in RANKS.items():
        if len(token) == 1:
            continue
        parts = [bytes([value]) for value in token]
        while len(parts) > 1:
            ranks = [RANKS.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            assert ranks[best] <= rank
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        assert parts == [token]


@hypothesis.given(st.text())
def test_any_text_survives_the_round_trip(text):
    assert ENCODING.decode(ENCODING.encode(text)) == text


def pieces(text):
    return [ENCODING.decode([token]) for token in ENCODING.encode(text)]


def test_capitals_and_digits_stay_single():
    for word in ("CAT", "PICTURE", "WHAT", "IS", "ZQXJ", "1234567890"):
        assert pieces(word) == list(word)
        assert pieces(f"a word {word}")[-len(word) :] == list(word)
    assert not any(token[:1] == b" " and token[1:2].isupper() for token in RANKS)


def test_what_every_prompt_holds_is_short():
    assert pieces("Picture 1: ") == ["Picture", " ", "1", ":", " "]
    assert pieces("You are a helpful assistant.") == ["You", " are", " a", " helpful", " assistant", "."]
    for role in ("system", "user", "assistant"):
        assert pieces(role) == [role]
    assert pieces("(12,3),(45,67)").count("),(") == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_are_short(language):
    lengths = collections.defaultdict(list)
    for index in range(200):
        scene = sample_scene(9, "train", index)
        for question in scene_questions(scene, np.random.default_rng(index), chinese_share=float(language == "zh")):
            text = "".join(part.get("text", "") for part in as_parts(question.question))
            lengths[question.kind].append(len(ENCODING.encode(text)))
            if isinstance(question.answer, str) and question.kind in ("color", "shape", "exist", "relation"):
                assert len(ENCODING.encode(question.answer)) == 1
    every = [length for values in lengths.values() for length in values]
    assert np.mean(every) < 9
    assert max(np.mean(values) for values in lengths.values()) < 14.5


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="only 258 of 807 ranks"):
        train(collections.Counter({"aaa": 1}))
