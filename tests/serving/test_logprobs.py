"""A reply's text cut into the texts of its tokens."""

import pytest

from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.inference.requests import TokenChoice
from qwenvl_jax.inference.text import TextStream, token_bytes
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.serving.logprobs import LEAST, Aligner, TokenTexts, chat_logprobs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(locate("tiny") / "qwen.tiktoken", 64)


def choices(tokens: list[int]) -> list[TokenChoice]:
    return [TokenChoice(token, -0.1, ((token, -0.1),)) for token in tokens]


TEXTS = ["Where is it?", "黄色的十字", "👩‍👩‍👧 🇩🇪", "é ñ", "  both ends  ", "\n", "a <box>(1,2)</box>"]


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_texts_of_tokens_joined_are_the_reply(tokenizer, text, strip):
    tokens = tokenizer.encode(text)
    stream = TextStream(token_bytes(tokenizer), strip=strip)
    reply = stream.feed(tokens) + stream.finish()
    texts = TokenTexts(tokenizer)
    pieces = Aligner(texts).split(reply, choices(tokens))
    assert "".join(pieces) == reply == (text.strip() if strip else text)
    content = chat_logprobs(texts, pieces, choices(tokens))["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == text.encode()


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_token_by_token(tokenizer, text):
    """Text may come before its tokens."""
    tokens = tokenizer.encode(text)
    stream, aligner = TextStream(token_bytes(tokenizer)), Aligner(TokenTexts(tokenizer))
    pieces = []
    for token in tokens:
        pieces += aligner.split(stream.feed([token]), choices([token]))
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_belongs_to_the_last(tokenizer):
    tokens = tokenizer.encode("🇩")
    assert len(tokens) > 1
    assert Aligner(TokenTexts(tokenizer)).split("🇩", choices(tokens)) == [""] * (len(tokens) - 1) + ["🇩"]


def test_what_a_stop_string_cuts_off_is_no_text(tokenizer):
    tokens = tokenizer.encode("one two")
    assert "".join(Aligner(TokenTexts(tokenizer)).split("one t", choices(tokens))) == "one t"


def test_names_of_tokens(tokenizer):
    texts = TokenTexts(tokenizer)
    choice = TokenChoice(65, float("-inf"), ((tokenizer.im_end_id, -0.5), (10**6, float("nan"))))
    entry = chat_logprobs(texts, [""], [choice])["content"][0]
    assert entry["logprob"] == LEAST
    assert entry["top_logprobs"][0] == {"token": "<|im_end|>", "logprob": -0.5, "bytes": list(b"<|im_end|>")}
    assert entry["top_logprobs"][1] == {"token": "token_id:1000000", "logprob": LEAST, "bytes": []}
