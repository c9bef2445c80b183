import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_jax.inference.text import TextStream, token_bytes

BYTES = {byte: bytes([byte]) for byte in range(256)}
WORDS = BYTES | {300: b"sto", 301: b"pping", 302: "笑".encode()[:2], 303: "笑".encode()[2:] + b"!"}


def run(stream: TextStream, *parts: list[int]) -> list[str]:
    return [*(stream.feed(part) for part in parts), stream.finish()]


def test_a_character_comes_when_it_is_whole():
    assert run(TextStream(WORDS), [302], [303], [302]) == ["", "笑!", "", "�"]


def test_a_stop_string_across_tokens_is_never_shown():
    stream = TextStream(WORDS, stop=("stopp",))
    assert run(stream, [*b"do not "], [300], [301], [*b"more"]) == ["do not ", "", "", "", ""]
    assert (stream.stopped, stream.tokens) == (True, 9)  # nothing after it counts


def test_what_only_began_like_a_stop_string_is_shown():
    assert run(TextStream(WORDS, stop=("stop it", "pi")), [300], [*b"p at"], [*b" stop"]) == [
        "",
        "stop at",
        " ",
        "stop",
    ]


def test_the_first_of_several_stop_strings_counts():
    stream = TextStream(BYTES, stop=("c", "bcd"))
    assert "".join(run(stream, [*b"abcd"])) == "ab"
    assert "".join(run(TextStream(BYTES, stop=("d", "bcd")), [*b"abcd"])) == "a"


def test_stop_strings_count_from_the_least_length_on():
    stream = TextStream(BYTES, stop=("b",), min_tokens=3)
    assert "".join(run(stream, [*b"abababab"])) == "aba"
    assert stream.tokens == 4


def test_blanks_at_both_ends_are_left_out():
    assert run(TextStream(BYTES, strip=True), [*b" \n a"], [*b" "], [*b"b "], [*b"\n"]) == ["a", "", " b", "", ""]
    assert "".join(run(TextStream(BYTES, strip=True), [*b"  \n"])) == ""
    assert "".join(run(TextStream(BYTES, strip=True, stop=("x",)), [*b" a \nx"])) == "a"
    assert "".join(run(TextStream(BYTES), [*b" a "])) == " a "


@given(
    text=st.text(alphabet="ab \né笑", max_size=30),
    stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    strip=st.booleans(),
)
def test_any_cut_gives_the_text_before_the_first_stop_string(text, stops, cuts, strip):
    """The first to be complete, and of those that are complete at the same character the longest."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    starts = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)]
    expected = text[: min(starts)] if ends else text
    content = list(text.encode())
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    stream = TextStream(BYTES, stop=stops, strip=strip)
    pieces = run(stream, *(content[start:end] for start, end in itertools.pairwise(edges)))
    assert "".join(pieces) == (expected.strip() if strip else expected)
    assert stream.stopped == bool(ends)


def test_the_text_is_that_of_the_processor(vlm):
    """Every token of the vocabulary, in one text and each by itself."""
    tokenizer = vlm.processor.tokenizer
    table = token_bytes(tokenizer)
    every = range(vlm.config.vocab_size)
    assert "".join(run(TextStream(table), list(every))) == vlm.processor.decode(every)
    for token in every:
        assert "".join(run(TextStream(table), [token])) == vlm.processor.decode([token])


@pytest.mark.parametrize("strip", [True, False])
def test_no_tokens_no_text(strip):
    assert run(TextStream(BYTES, strip=strip)) == [""]
