"""Prompts that begin alike are read in two calls, and rows that are done are left behind: no reply changes by it."""

import dataclasses

import numpy as np
import pytest
from prompts import longer, picture_prompt, run, text_prompt

from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.sharing import shared_beginnings

FREQUENCIES = np.ones((1, 2), np.float32)


def plan(rows, rotary=None, room=64):
    """What is shared by rows of tokens."""
    tokens = np.zeros((len(rows), room), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    rotary = np.repeat(FREQUENCIES, len(rows), axis=0) if rotary is None else rotary
    return shared_beginnings(tokens, np.array([len(row) for row in rows]), rotary, 64)


def questions(begin, count, seed=0, length=6):
    """Prompts that begin alike and end in ways of their own, of different lengths."""
    return [longer(begin, length + number % 5, seed=100 * seed + number + 1) for number in range(count)]


def test_what_rows_have_in_common():
    begin, other = list(range(10, 50)), list(range(110, 150))
    found = plan([[*begin, 1, 2, 3], [*other, 1], [*begin, 4], [*other, 2, 2], *([*begin, 5, n] for n in range(12))])
    assert (found.length, found.rest, len(found.first)) == (40, 16, 2)
    assert found.which[0] == found.which[2] != found.which[1] == found.which[3]
    assert set(found.first[found.which[:4]]) <= set(range(16))


def test_every_row_keeps_a_token_and_finds_room():
    same = list(range(50))
    found = plan([same] * 16)
    assert found.length == 48  # 49 would leave one token, which with its padding does not fit
    assert found.length + found.rest <= 64
    assert plan([same[:20]] * 16).length == 19


def test_what_is_not_worth_it_is_not_shared():
    assert plan([[1, 2, 3]]) is None
    assert plan([list(range(start, start + 50)) for start in range(0, 1600, 100)]) is None
    assert plan([[7, *range(start, start + 49)] for start in range(0, 1600, 100)]) is None


def test_other_rotary_frequencies_share_nothing():
    rows, rotary = [[*range(40), n] for n in range(16)], np.repeat(FREQUENCIES, 16, axis=0)
    assert len(plan(rows, rotary).first) == 1
    rotary[::2] = 2.0
    found = plan(rows, rotary)
    assert len(found.first) == 2
    assert len(set(found.which[::2])) == len(set(found.which[1::2])) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shared_reading_changes_no_reply(generator, temperature):
    """About two pictures and on both sides of dynamic NTK's first step (64 tokens): logits and replies as if alone."""
    first, second = picture_prompt(40, seed=1), picture_prompt(40, seed=2)
    near = picture_prompt(53, seed=3)
    prompts = [*questions(first, 6), *questions(second, 6, seed=1), *questions(near, 3, seed=2)]
    assert {len(prompt.input_ids) > 64 for prompt in prompts} == {False, True}
    batch = generator.batch(prompts)
    shared = generator._shared(batch, len(prompts))
    assert 3 <= len(shared.first) <= 4
    assert batch.features.shape[0] == 4  # three pictures, each once
    option = SamplingOptions(temperature=temperature, max_new_tokens=12, repetition_penalty=1.1)
    generation = Generation(generator, prompts, [option] * len(prompts))
    generation.advance()
    together = generation.logits
    for row, prompt in enumerate(prompts):
        alone = Generation(generator, [prompt], [option])
        alone.advance()
        np.testing.assert_allclose(together[row], alone.logits[0], atol=2e-4, rtol=0)  # of up to 10
    replies = run(generator, prompts, option)
    assert replies == [run(generator, [prompt], option)[0] for prompt in prompts]


def test_long_rests_are_read_by_themselves(generator):
    """Of sixteen rows four have more than sixteen tokens of their own; they stand between the others."""
    begin = picture_prompt(70, seed=6)
    short, long = questions(begin, 11), questions(begin, 4, seed=1, length=17)
    prompts = [*short[:5], *long[:3], *short[5:], *long[3:]]
    assert generator._shared(generator.batch(prompts), 15).rest == 32
    option = SamplingOptions(max_new_tokens=6)
    before = generator.programs.compiled
    assert run(generator, prompts, option) == [run(generator, [prompt], option)[0] for prompt in prompts]
    assert generator.programs.compiled > before
    assert generator._together.jitted._cache_size() == 1


def test_texts_share_what_they_begin_with(generator):
    prompts = questions(text_prompt(40), 7)
    assert generator._shared(generator.batch(prompts), 7).length >= 40
    option = SamplingOptions(max_new_tokens=5)
    assert run(generator, prompts, option) == [run(generator, [prompt], option)[0] for prompt in prompts]


def test_an_equal_picture_is_encoded_once(generator):
    one = picture_prompt(9, seed=4)
    other = dataclasses.replace(text_prompt(3), pixels=one.pixels.copy())
    twice = picture_prompt(9, seed=4, pictures=2)
    again = dataclasses.replace(twice, pixels=np.concatenate([one.pixels, one.pixels]))
    batch = generator.batch([one, again, other])
    assert batch.features.shape[0] == 1
    assert batch.slots[1, :8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_rows_that_are_done_are_left_behind(generator):
    """Of sixteen replies three go on, beyond a flush of the cache; one of them the caller ends."""
    prompts = questions(picture_prompt(20, seed=5), 13)
    most = [70 if row in (2, 7, 12) else 1 + row % 3 for row in range(13)]
    options = [SamplingOptions(max_new_tokens=count) for count in most]
    generation = Generation(generator, prompts, options)
    replies = [[] for _ in prompts]
    while not generation.finished:
        for row, new in enumerate(generation.advance(4)):
            replies[row] += new
        if len(replies[7]) > 8:
            generation.stop(7)
    assert generation.rows == 4
    assert generation.finish_reasons[7] == "stop"
    for row, prompt in enumerate(prompts):
        alone = Generation(generator, [prompt], [options[row]])
        tokens = []
        while not alone.finished:
            tokens += alone.advance()[0]
        assert replies[row] == tokens[: len(replies[row])]
        assert len(replies[row]) == (9 if row == 7 else most[row])
