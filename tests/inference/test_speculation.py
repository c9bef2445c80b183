"""Prompt lookup: drafts are what followed the same tokens before, and replies with them are those without."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from flax import nnx
from prompts import ask, longer, picture_prompt, run, text_prompt

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.programs import Program
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.inference.speculation import LONGEST, NOTHING, SHORTEST, draftable, drafted
from qwenvl_jax.models.qwen_vl import QwenVL

DRAFTS = 3
LENGTH = 250
TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}


def looked_up(tokens: list[int]) -> list[int]:
    """What `drafted` should find, by searching a list."""
    for count in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, count - 1, -1):
            if tokens[end - count : end] == tokens[-count:]:
                guesses = tokens[end : end + DRAFTS]
                return guesses + [NOTHING] * (DRAFTS - len(guesses))
    return [NOTHING] * DRAFTS


def test_drafts_are_what_followed_the_same_tokens():
    """Of few kinds, so that there is something to find, and as stale as what lies behind the newest token."""
    random = np.random.default_rng(0)
    history = random.integers(0, 4, (64, 24)).astype(np.int32)
    known = random.integers(0, 23, 64).astype(np.int32)
    last = random.integers(0, 4, 64).astype(np.int32)
    filled, read = jax.jit(drafted, static_argnums=3)(history, last, known, DRAFTS)
    expected = [[*history[row, : known[row]].tolist(), int(last[row])] for row in range(64)]
    assert [filled[row, : known[row] + 1].tolist() for row in range(64)] == expected
    assert read.tolist() == [[tokens[-1], *looked_up(tokens)] for tokens in expected]
    found = np.asarray(read)[:, 1:] != NOTHING
    assert 20 < found.any(axis=1).sum() < 64
    assert (found.any(axis=1) & ~found.all(axis=1)).sum() > 3  # the reply's end comes before the last draft


def test_only_greedy_replies_that_nothing_changes_take_drafts():
    options = [
        {}, {"temperature": 1.0}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
        {"logit_bias": {3: 1.0}}, {"min_new_tokens": 3},
    ]  # fmt: skip
    rows = controls([SamplingOptions(max_new_tokens=9, **each) for each in options], [], 320)
    assert draftable(rows, np.full(7, 2)).tolist() == [True, *[False] * 6]
    assert draftable(rows, np.full(7, 3)).tolist() == [True, *[False] * 5, True]
    for more in ({"logprobs": True}, {"allowed": np.ones(320, bool)}):
        assert not draftable(controls([SamplingOptions()], [], 320, **more), np.zeros(1))[0]


@pytest.fixture(scope="module")
def model(small_model) -> QwenVL:
    """With embeddings so large that the newest token decides what comes next: its replies soon go in circles."""
    model = QwenVL(small_model.config, rngs=nnx.Rngs(0))
    model.embedding.table[...] *= 10_000
    return model


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model)


@pytest.fixture(scope="module")
def engine(model) -> Iterator[Engine]:
    options = EngineOptions(slots=8, max_length=LENGTH, pictures=20, prefixes=1024, speculate=DRAFTS)
    engine = Engine(Generator(model), TABLE, options)
    engine.warm_up()
    engine.start()
    yield engine
    engine.stop()


class CountedSteps:
    """A program of decode steps that adds what it is asked for to a count."""

    def __init__(self, program: Program, width: int, asked: dict[bool, int]):
        self._program, self._width, self._asked = program, width, asked

    def __getitem__(self, size: tuple[int, int]) -> Callable:
        def call(leaves, past, fixed, used, end, stopped, *, state):
            self._asked[self._width > 1] += int(end - used) // self._width
            return self._program[size](leaves, past, fixed, used, end, stopped, state=state)

        return call


@pytest.fixture
def steps(engine, monkeypatch) -> dict[bool, int]:
    """How many steps have been asked for, with drafts and without."""
    asked = {True: 0, False: 0}
    programs = engine._programs
    monkeypatch.setattr(programs, "speculate", CountedSteps(programs.speculate, 1 + DRAFTS, asked))
    monkeypatch.setattr(programs, "decode", CountedSteps(programs.decode, 1, asked))
    return asked


def texts(replies: list[list[int]]) -> list[str]:
    return ["".join(TABLE[token].decode() for token in reply) for reply in replies]


def test_replies_are_those_without_and_take_fewer_steps(engine, generator, steps):
    """One at a time."""
    for seed in range(6):
        prompt = longer(picture_prompt(20, seed, pictures=2), 20 + seed)
        option = SamplingOptions(max_new_tokens=100)
        reply = ask(engine, prompt, option)
        assert [reply.text] == texts(run(generator, [prompt], option))
        assert (reply.last.tokens, reply.last.finish_reason) == (100, "length")
    assert steps[True] < 0.7 * 6 * 100
    assert steps[False] == 0


def test_side_by_side_with_replies_that_take_none(engine, generator):
    """Drawn, penalised and with log-probabilities; with stop tokens that a draft may be; to the end of the cache."""
    wanted = []
    for number in range(16):
        length = int(np.random.default_rng(number).integers(2, 100))
        changed = [{}, {"temperature": 0.8, "seed": number}, {"repetition_penalty": 1.2}, {"min_new_tokens": 30}]
        option = SamplingOptions(max_new_tokens=min(20 + 13 * number, LENGTH - length), **changed[number % 4])
        wanted.append((text_prompt(length, number), option, {"alternatives": 2} if number % 5 == 0 else {}))
    replies = [ask(engine, prompt, option, **more) for prompt, option, more in wanted]
    for (prompt, option, more), reply in zip(wanted, replies, strict=True):
        assert [reply.text] == texts(run(generator, [prompt], option))
        assert len(reply.tokens) == (reply.last.tokens if more else 0)
    prompt = text_prompt(30)
    (tokens,) = run(generator, [prompt], SamplingOptions(max_new_tokens=60))
    for at in (tokens.index(token) for token in sorted(set(tokens))):
        stopped = ask(engine, prompt, SamplingOptions(max_new_tokens=60), stop_ids=(tokens[at],))
        assert (stopped.text, stopped.last.tokens) == (texts([tokens[:at]])[0], at + 1)
    whole = ask(engine, text_prompt(150), SamplingOptions(max_new_tokens=1000))
    assert [whole.text] == texts(run(generator, [text_prompt(150)], SamplingOptions(max_new_tokens=100)))
    assert (engine.running, engine.waiting, engine.recompiles, engine.cache_usage) == (0, 0, 0, 0)


@pytest.mark.parametrize("drafts", [-1, 16])
def test_more_drafts_than_there_is_room_for(drafts):
    with pytest.raises(UserError, match=rf"speculate is {drafts}; it must be at (least 0|most 15)"):
        EngineOptions(speculate=drafts)
