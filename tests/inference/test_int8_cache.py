"""An engine with its cache in 8 bits: what is stored, what it is counted as, and that the tiny model hardly notices."""

import dataclasses
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.inference import steps
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.memory import plan_memory
from qwenvl_jax.inference.requests import Request, Update
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.text import token_bytes
from qwenvl_jax.vlm import VLM, Messages

OPTIONS = EngineOptions(slots=2, max_length=128, pictures=8, prefixes=1024, cache="int8")
LONG = 2 * steps.CHUNK + 4  # tokens of a reply that is flushed twice
PICTURES = REPOSITORY / "qwenvl_jax" / "assets" / "pictures"
QUESTIONS = {
    "word": "Where is the yellow cross?",
    "tiles": "What is in the picture?",
    "number": "Describe the picture.",
}


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return qwenvl_jax.load("tiny")


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    engine = Engine(qwenvl_jax.load("tiny").generator, token_bytes(tiny.processor.tokenizer), OPTIONS)
    engine.warm_up()
    engine.start()
    yield engine
    engine.stop()
    assert engine.recompiles == 0


def question(name: str) -> Messages:
    picture = {"type": "image", "image": str(PICTURES / f"{name}.png")}
    return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTIONS[name]}]}]


def ask(engine: Engine, tiny: VLM, conversations: list[Messages], least: int = 0) -> list[list[Update]]:
    """The updates of each reply, to conversations that come in together."""
    heard: list[list[Update]] = [[] for _ in conversations]
    ended = threading.Semaphore(0)

    def listener(updates):
        return lambda update: (updates.append(update), update.finish_reason and ended.release())

    tokenizer = tiny.processor.tokenizer
    for messages, updates in zip(conversations, heard, strict=True):
        prompt = tiny.processor.chat(messages)
        option = SamplingOptions(max_new_tokens=max(least, 30), min_new_tokens=min(least, 128 - len(prompt.input_ids)))
        stops = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)
        engine.submit(Request(prompt, option, stops, strip=True), listener(updates))
    assert all(ended.acquire(timeout=60) for _ in conversations)
    assert {updates[-1].finish_reason for updates in heard} <= {"stop", "length"}
    return heard


def text(updates: list[Update]) -> str:
    return "".join(update.text for update in updates)


def test_the_tiny_model_gives_the_same_replies(engine, tiny):
    """More of them than rows, so that rows are taken and left; then again after a prefix that is kept in 8 bits."""
    conversations = [question(name) for name in QUESTIONS]
    plain = [tiny.chat(messages).text for messages in conversations]
    first = ask(engine, tiny, conversations)
    again = ask(engine, tiny, conversations)
    assert [text(updates) for updates in first] == plain
    assert [text(updates) for updates in again] == plain
    assert [updates[-1].cached_tokens for updates in first + again] == [0] * 3 + [64] * 3
    past = engine._batches.batches[0]._past
    assert {leaf.dtype for leaf in jax.tree.leaves(past)} == {np.dtype(np.int8), np.dtype(np.float32)}
    assert all(tokens.codes.dtype == np.int8 for tokens in past.k + past.v)


def test_a_reply_outlives_the_recent_part(engine, tiny):
    """Its own tokens are moved to the past, alone and in the second row of a batch."""
    messages = [{"role": "user", "content": "Which shapes are there?"}]
    plain = tiny.chat(messages, max_new_tokens=LONG, min_new_tokens=LONG)
    assert plain.usage.completion_tokens == LONG
    (alone,) = ask(engine, tiny, [messages], least=LONG)
    _, second = ask(engine, tiny, [question("word"), messages], least=LONG)
    assert text(alone) == text(second) == plain.text


def next_logits(tiny: VLM, generation: Generation, past: steps.Past) -> np.ndarray:
    state, fixed, stopped = generation._state, generation._fixed, generation._stopped
    program = tiny.generator.decode_steps.jitted  # the key of a program that is compiled ahead has no dtypes
    state, _ = program(
        tiny.generator.leaves, past, fixed, np.int32(0), np.int32(1), stopped, state=jax.tree.map(jnp.copy, state)
    )
    return np.asarray(state.logits)


def test_logits_are_off_by_little(tiny):
    """The next token's after prompts in 8 bits.

    A number of a key or value is off by up to half a step of 1/127 of the largest of its token and head, evenly
    spread: by 1 / (127 sqrt(12)) of that, the largest being two to three times the usual, so by 0.5 to 0.7%. Errors of
    tokens and layers have either sign. Logits should be off by a few times 0.7% of their spread at most; 0.2 to 1.1% is
    what is seen.
    """
    in_int8 = jax.jit(steps.in_int8)
    for name in QUESTIONS:
        generation = Generation(tiny.generator, [tiny.processor.chat(question(name))], [SamplingOptions()])
        generation.advance()
        plain, int8 = (next_logits(tiny, generation, past) for past in (generation._past, in_int8(generation._past)))
        off = np.sqrt(np.mean((int8 - plain) ** 2)) / np.std(plain)
        assert 1e-5 < off < 3 * 0.007


def test_what_an_engine_needs_counts_codes_and_scales(tiny, engine):
    plan = plan_memory(tiny.generator, OPTIONS)
    leaves = jax.tree.leaves(engine._batches.batches[0]._past)
    rows, slots = engine._batches.batches[0].size
    assert plan.prefixes == OPTIONS.prefixes * sum(leaf.nbytes for leaf in leaves) // (rows * slots)
    full = plan_memory(tiny.generator, dataclasses.replace(OPTIONS, cache="model"))
    assert plan.prefixes * 4 * 32 == full.prefixes * (32 + 4)
    assert plan.cache < full.cache / 2
    assert (plan.weights, plan.work, plan.pictures) == (full.weights, full.work, full.pictures)


def test_an_unknown_form_of_the_cache():
    with pytest.raises(UserError, match="cache is 'int4'; it must be one of model, int8"):
        EngineOptions(cache="int4")  # type: ignore[arg-type]
