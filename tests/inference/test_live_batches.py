"""Batches side by side: what each reply gets is what it gets alone, and they are as full as each other."""

import threading
from collections.abc import Iterator

import pytest
from prompts import Listening, ask, picture_prompt, run, text_prompt

from qwenvl_jax.inference import engine as engines
from qwenvl_jax.inference import live_batches
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.live_batches import side_by_side
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.slots import LiveBatch

TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}
BATCHES = 3
LONG = SamplingOptions(max_new_tokens=100)


@pytest.fixture(scope="module")
def engine(small_model) -> Iterator[Engine]:
    """Of seven replies, in batches of three rows each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "side_by_side", lambda generator, slots: BATCHES)
        engine = Engine(Generator(small_model), TABLE, EngineOptions(slots=7, max_length=160))
    engine.warm_up()
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(autouse=True)
def nothing_is_left(engine) -> Iterator[None]:
    yield
    assert (engine.running, engine.waiting, engine.recompiles, engine.cache_usage) == (0, 0, 0, 0)


def alone(generator: Generator, prompt, option: SamplingOptions) -> str:
    return "".join(TABLE[token].decode() for token in run(generator, [prompt], option)[0])


def test_everyone_gets_what_it_gets_alone(engine, generator):
    """More requests than there are rows, of several lengths, some of them drawn, some read together."""
    prompts = [
        picture_prompt(30 + number, number % 4) if number % 2 else text_prompt(20, number) for number in range(15)
    ]
    options = [
        SamplingOptions(max_new_tokens=5 + 6 * number, **({"temperature": 0.8, "seed": number} if number % 3 else {}))
        for number in range(15)
    ]
    expected = [alone(generator, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    replies = [ask(engine, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    assert [reply.text for reply in replies] == expected


def test_as_many_as_there_are_slots_in_batches_as_full_as_each_other(engine, monkeypatch):
    """Seven at one time, though the batches have nine rows; each batch is always asked by the same thread."""
    seen, threads, decode = [], {}, LiveBatch.decode

    def noted(self, steps, speculate):
        seen.append([int(batch.live.sum()) for batch in engine._batches.batches])
        if sum(map(bool, seen[-1])) > 1:
            threads.setdefault(id(self), set()).add(threading.get_ident())
        return decode(self, steps, speculate)

    monkeypatch.setattr(LiveBatch, "decode", noted)
    replies = [ask(engine, text_prompt(20, number), LONG) for number in range(9)]
    assert [reply.last.finish_reason for reply in replies] == ["length"] * 9
    assert max(map(sum, seen)) == 7
    assert [3, 2, 2] in seen
    assert all(max(counts) - min(counts) <= 1 for counts in seen if sum(counts) == 7)
    assert len(threads) == BATCHES
    assert all(len(own) == 1 for own in threads.values())
    assert len(set.union(*threads.values())) == BATCHES


def test_a_batch_that_fails_ends_what_is_in_progress(engine, monkeypatch, generator):
    """All replies of the turn are told; the next ones find every batch empty and right."""
    failing, decode = engine._batches.batches[1], LiveBatch.decode

    def failing_once(self, steps, speculate):
        if self is failing:
            monkeypatch.undo()
            raise RuntimeError("out of memory")
        return decode(self, steps, speculate)

    monkeypatch.setattr(LiveBatch, "decode", failing_once)
    first, second = (ask(engine, text_prompt(20, number), LONG) for number in range(2))
    assert [reply.last.error for reply in (first, second)] == ["RuntimeError('out of memory')"] * 2
    prompts = [text_prompt(25, number) for number in range(6)]
    expected = [alone(generator, prompt, LONG) for prompt in prompts]
    replies = [ask(engine, prompt, LONG) for prompt in prompts]
    assert [reply.text for reply in replies] == expected


def test_who_goes_leaves_the_other_batches_alone(engine, generator):
    gone, stays = Listening(), text_prompt(30)
    expected = alone(generator, stays, LONG)
    first = engine.submit(Request(text_prompt(40, 1), LONG), gone)
    reply = ask(engine, stays, LONG)
    engine.cancel(first)
    assert reply.text == expected


@pytest.mark.parametrize(("cores", "slots", "batches"), [(2, 32, 2), (2, 16, 2), (2, 15, 1), (16, 32, 4), (1, 32, 1)])
def test_a_core_has_a_batch_of_enough_rows(generator, monkeypatch, cores, slots, batches):
    monkeypatch.setattr(live_batches.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert side_by_side(generator, slots) == batches


def test_a_large_model_has_one_batch(generator, monkeypatch):
    monkeypatch.setattr(live_batches.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(live_batches, "SMALL_MODEL", sum(leaf.nbytes for leaf in generator.leaves) - 1)
    assert side_by_side(generator, 32) == 1
