"""The reader of an engine: what is read together, what piece by piece, and that no reply depends on either."""

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from prompts import Listening, ask, longer, picture_prompt, run, text_prompt

from qwenvl_jax.inference import engine as engine_module
from qwenvl_jax.inference import reading
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.reading import PromptReader
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.slots import LiveBatch
from qwenvl_jax.processing.template import Prompt

MOST = 128  # tokens of a call, so that the small model has prompts of several
TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}
OPTION = SamplingOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine(small_model) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MOST_TOKENS", MOST)
        patch.setattr(engine_module, "MOST_TOKENS", MOST)
        patch.setattr(reading, "EXTENSIONS", (16, 64))
        patch.setattr(reading, "TOGETHER", (1, 2))
        engine = Engine(Generator(small_model), TABLE, EngineOptions(slots=4, max_length=250, pictures=3))
        engine.warm_up()
        engine.start()
        yield engine
        engine.stop()
        assert (engine.running, engine.waiting, engine.recompiles) == (0, 0, 0)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many prompts each call of the reader has, and 0 for each call of decode steps."""
    found: list[int] = []
    read, decode = PromptReader.read, LiveBatch.decode

    def noted(self, replies):
        found.append(len(replies))
        return read(self, replies)

    def noted_decode(self, *arguments):
        found.append(0)
        return decode(self, *arguments)

    monkeypatch.setattr(PromptReader, "read", noted)
    monkeypatch.setattr(LiveBatch, "decode", noted_decode)
    return found


def asked(engine: Engine, prompts: Sequence[Prompt], options: Sequence[SamplingOptions] = ()) -> list[Listening]:
    """Replies to prompts that wait together before the first is read."""
    options = options or [OPTION] * len(prompts)
    gate, admit = threading.Event(), Engine._admit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_admit", lambda self: (gate.wait(), admit(self)))
        replies = [ask(engine, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
        gate.set()
    assert all(reply.ended.wait(60) for reply in replies)
    return replies


def begun(engine: Engine, prompt: Prompt, option: SamplingOptions) -> Listening:
    """A reply that has its first tokens."""
    reply = ask(engine, prompt, option)
    while not reply.updates:
        time.sleep(0.001)
    return reply


def alone(generator: Generator, prompt: Prompt, option: SamplingOptions = OPTION) -> str:
    return "".join(TABLE[token].decode() for token in run(generator, [prompt], option)[0])


def test_prompts_of_one_size_are_read_by_one_call(engine, generator, calls):
    """With pictures and without, among others of another size, which keep their turn."""
    prompts = [text_prompt(30), picture_prompt(20, 1, pictures=2), text_prompt(100, 2), text_prompt(7, 3)]
    replies = asked(engine, prompts)
    assert [reply.text for reply in replies] == [alone(generator, prompt) for prompt in prompts]
    assert [call for call in calls if call] == [2, 1, 1]


def test_options_stay_with_their_prompts(engine, generator, calls):
    prompts = [picture_prompt(20, seed) for seed in (4, 5)]
    options = [SamplingOptions(max_new_tokens=9 + seed, temperature=0.9, seed=seed) for seed in range(2)]
    replies = asked(engine, prompts, options)
    expected = [alone(generator, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    assert [reply.text for reply in replies] == expected
    assert [call for call in calls if call] == [2]


def test_prompts_that_begin_alike_are_read_one_after_the_other(engine, generator, calls):
    start = text_prompt(70, 8)
    prompts = [text_prompt(20), *(longer(start, 20, seed) for seed in (1, 2))]
    replies = asked(engine, prompts)
    assert [reply.text for reply in replies] == [alone(generator, prompt) for prompt in prompts]
    assert [reply.last.cached_tokens for reply in replies] == [0, 0, 64]
    assert [call for call in calls if call] == [1, 1, 1]


@pytest.mark.parametrize("pictures", [0, 9], ids=["text", "pictures"])
def test_a_long_prompt_does_not_hold_up_the_others(engine, generator, calls, pictures):
    """Its pieces have steps of the other reply between them; it has more pictures than are kept."""
    long = picture_prompt(190, 6, pictures)
    other, option = text_prompt(10, pictures), SamplingOptions(max_new_tokens=150)
    replies = [begun(engine, other, option), ask(engine, long, OPTION)]
    assert [reply.text for reply in replies] == [alone(generator, other, option), alone(generator, long)]
    reads = [place for place, call in enumerate(calls) if call]
    assert len(reads) == 3
    assert 0 in calls[reads[1] : reads[2]]


def test_a_long_prompt_that_is_given_up_leaves_nothing(engine, generator, monkeypatch):
    """Another long one comes after it; neither is read to its end before the first is gone."""
    read, left = PromptReader.read, []

    def cancelled(self, replies):
        done = read(self, replies)
        if not left and done.grown is None:
            left.append(replies[0])
            engine.cancel(replies[0])
        return done

    monkeypatch.setattr(PromptReader, "read", cancelled)
    busy = begun(engine, text_prompt(10), SamplingOptions(max_new_tokens=100))
    gone = Listening()
    first = engine.submit(Request(text_prompt(200, 21), OPTION), gone)
    second = ask(engine, text_prompt(220, 22), OPTION)
    assert second.text == alone(generator, text_prompt(220, 22))
    assert busy.text == alone(generator, text_prompt(10), SamplingOptions(max_new_tokens=100))
    assert left == [first]
    assert not gone.updates


def test_a_prompt_that_cannot_be_read_fails_alone(engine, generator, calls):
    bad = picture_prompt(20, 1)
    bad = Prompt(bad.input_ids, bad.image_slots, np.zeros((1, 3, 7, 7), np.float32), [])
    prompts = [text_prompt(30), bad, picture_prompt(20, 12)]
    replies = asked(engine, prompts)
    assert replies[1].last.finish_reason == "error"
    assert [replies[0].text, replies[2].text] == [alone(generator, prompts[0]), alone(generator, prompts[2])]


def test_what_another_prompt_has_behind_a_common_beginning_is_not_seen(engine, generator):
    """No numbers, which no mask would hide."""
    start, picture = text_prompt(70, 31), picture_prompt(10, 32)
    broken = Prompt(
        np.concatenate([start.input_ids, picture.input_ids]),
        np.concatenate([start.image_slots, picture.image_slots]),
        np.full_like(picture.pixels, np.nan),
        [],
    )
    assert ask(engine, broken, OPTION).last.finish_reason == "error"
    prompt = longer(start, 3, seed=33)
    reply = ask(engine, prompt, OPTION)
    assert reply.text == alone(generator, prompt)
    assert reply.last.cached_tokens == 64
