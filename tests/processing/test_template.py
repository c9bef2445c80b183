"""The building blocks of ChatML prompts: ids, image slots and labels."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.processing import template
from qwenvl_jax.processing.template import IGNORED, Segment, Slots, Special
from qwenvl_jax.processing.tokenizer import SPECIAL_TOKENS, Tokenizer

VOCABULARY = Path(__file__).parents[1] / "fixtures" / "qwen-vl-chat-tiny" / "qwen.tiktoken"
tokenizer = Tokenizer.from_file(VOCABULARY, n_queries=4)
START, END, PAD = tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_pad_id
any_text = st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=5), max_size=5).map("".join)


def words(text: str) -> list[int]:
    return tokenizer.encode_ordinary(text)


def test_a_picture_span_and_its_slots():
    made = template.segment(tokenizer, ["hi ", *template.picture_pieces(tokenizer, row=1, number=7), "there"])
    before, after = words("hi Picture 7: "), words("\nthere")
    assert made.ids == [*before, START, PAD, PAD, PAD, PAD, END, *after]
    assert made.slots == [-1] * len(before) + [-1, 4, 5, 6, 7, -1] + [-1] * len(after)


def test_neighbouring_strings_are_one_text():
    assert template.segment(tokenizer, ["\n", "\nab", "c"]).ids == words("\n\nabc")
    assert template.segment(tokenizer, []) == Segment([], [])


def test_a_box():
    pieces = template.box_pieces(tokenizer, "dog", (20, 10, 40, 20), (200, 100))
    expected = tokenizer.encode("<ref>dog</ref><box>(100,100),(200,200)</box>")
    assert template.segment(tokenizer, pieces).ids == expected
    bare = template.box_pieces(tokenizer, None, (20, 10, 40, 20), (200, 100))
    assert template.segment(tokenizer, bare).ids == tokenizer.encode("<box>(100,100),(200,200)</box>")


def test_a_reply_may_hold_grounding_tags_and_nothing_else():
    text = "<ref>a</ref><box>(1,2),(3,4)</box><quad></quad><img>x</img><imgpad><|im_end|>"
    ids = template.segment(tokenizer, template.reply_pieces(tokenizer, text)).ids
    assert set(ids) >= tokenizer.grounding_ids
    assert {token for token in ids if token >= tokenizer.eod_id} == tokenizer.grounding_ids
    assert tokenizer.decode(ids) == text


@given(any_text)
@settings(deadline=None)
def test_text_never_becomes_a_special_token(text):
    made = template.segment(tokenizer, [text])
    assert all(token < tokenizer.eod_id for token in made.ids)
    assert made.slots == [-1] * len(made.ids)
    label = template.segment(tokenizer, template.box_pieces(tokenizer, text, (0, 0, 1, 1), (1, 1)))
    assert sum(token >= tokenizer.eod_id for token in label.ids) == 4


@given(st.lists(any_text | st.integers(0, 3).map(Slots) | st.just(Special(START)), max_size=6))
@settings(deadline=None)
def test_slots_stand_exactly_at_the_pads(pieces):
    made = template.segment(tokenizer, pieces)
    assert len(made.ids) == len(made.slots)
    assert [slot >= 0 for slot in made.slots] == [token == PAD for token in made.ids]
    rows = [piece.row for piece in pieces if isinstance(piece, Slots)]
    assert [slot for slot in made.slots if slot >= 0] == [4 * row + j for row in rows for j in range(4)]


def test_a_block_and_its_labels():
    content = template.segment(tokenizer, ["yes"])
    block = template.block(tokenizer, "assistant", content) + template.newline(tokenizer)
    text = "<|im_start|>assistant\nyes<|im_end|>\n"
    assert block.ids == tokenizer.encode(text)
    im_start, im_end, (newline,) = tokenizer.im_start_id, tokenizer.im_end_id, words("\n")
    inside = len(words("assistant")) + 1
    learnt = [*content.ids, im_end, newline]
    assert template.training_labels(tokenizer, "assistant", content) == [im_start, *[IGNORED] * inside, *learnt]
    assert template.training_labels(tokenizer, "assistant", content, answers_only=True) == (
        [IGNORED] * (1 + inside) + [*content.ids, im_end, IGNORED]  # a reply ends with <|im_end|>
    )


@pytest.mark.parametrize("role", ["system", "user"])
def test_other_roles_learn_their_frame_only(role):
    content = template.segment(tokenizer, ["some words"])
    block = template.block(tokenizer, role, content) + template.newline(tokenizer)
    labels = template.training_labels(tokenizer, role, content)
    assert labels == [block.ids[0], *[IGNORED] * (len(block) - 3), *block.ids[-2:]]
    assert template.training_labels(tokenizer, role, content, answers_only=True) == [IGNORED] * len(block)


@pytest.mark.parametrize(
    ("window", "kept"), [(0, 0), (10, 0), (11, 0), (13, 0), (14, 1), (18, 1), (19, 2), (21, 2), (22, 3), (99, 3)]
)
def test_the_window_keeps_whole_turns_from_the_newest(window, kept):
    assert template.newest_within([3, 5, 3], used=10, window=window) == kept


def test_a_turn_too_long_ends_the_window_even_if_older_ones_would_fit():
    assert template.newest_within([1, 100, 1], used=0, window=50) == 1


def test_arrays():
    ids, slots = template.segment(tokenizer, [Slots(0)]).arrays()
    assert ids.dtype == slots.dtype == "int32"
    assert ids.shape == slots.shape == (4,)
