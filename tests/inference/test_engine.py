"""The engine: a request gets what it gets alone, whoever shares the batch; nothing is compiled, lost or left over."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from prompts import Listening, ask, longer, picture_prompt, run, text_prompt

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.programs import NotCompiled
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.inference.slots import LiveBatch
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.processing.template import Prompt

LENGTH = 250  # no power of two, so that there is a last size that is none
PREFIXES = 1024
TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}


@pytest.fixture(scope="module")
def engine(small_model) -> Iterator[Engine]:
    engine = Engine(
        Generator(small_model), TABLE, EngineOptions(slots=17, max_length=LENGTH, pictures=20, prefixes=PREFIXES)
    )
    seen = []
    engine.warm_up(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(seen), len(seen))
    engine.start()
    yield engine
    engine.stop()
    assert not engine.alive


@pytest.fixture(autouse=True)
def nothing_is_left(engine) -> Iterator[None]:
    yield
    assert (engine.running, engine.waiting, engine.recompiles, engine.cache_usage) == (0, 0, 0, 0)


def texts(replies: list[list[int]]) -> list[str]:
    return ["".join(TABLE[token].decode() for token in reply) for reply in replies]


def test_everyone_gets_what_it_gets_alone(engine, generator):
    """More requests than rows, of all lengths, with pictures and without, greedy and drawn, some of one token."""
    prompts, options = [], []
    for number in range(24):
        length = int(np.random.default_rng(number).integers(1, 120))
        prompts.append(
            picture_prompt(length, number % 7, number % 3 + 1) if number % 2 else text_prompt(length, number)
        )
        drawn = {"temperature": 0.8, "top_p": 0.9, "seed": number, "repetition_penalty": 1.1} if number % 3 else {}
        options.append(SamplingOptions(max_new_tokens=1 + 11 * (number % 10), **drawn))
    alone = [texts(run(generator, [prompt], option))[0] for prompt, option in zip(prompts, options, strict=True)]
    for _ in range(2):  # the second time pictures are known
        replies = [ask(engine, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
        assert [reply.text for reply in replies] == alone
        assert [reply.last.tokens for reply in replies] == [option.max_new_tokens for option in options]
        assert {reply.last.finish_reason for reply in replies} == {"length"}
    pictures = [picture.tobytes() for prompt in prompts for picture in prompt.pixels]
    assert engine.picture_hits == (2 * len(pictures) - len(set(pictures)), 2 * len(pictures))


@pytest.mark.parametrize("by", [4, 24, 100])
def test_a_prompt_that_begins_like_another_is_not_read_twice(engine, generator, by):
    """By one call for a few tokens and by one for many; the pictures are in the part that is known."""
    start = picture_prompt(128, seed=by, pictures=2)
    assert ask(engine, start, SamplingOptions(max_new_tokens=1)).last.cached_tokens == 0
    prompt, option = longer(start, by), SamplingOptions(max_new_tokens=12, repetition_penalty=1.3)
    reply = ask(engine, prompt, option)
    assert [reply.text] == texts(run(generator, [prompt], option))
    assert reply.last.cached_tokens == 128


def test_another_picture_or_another_rotation_shares_nothing(engine, generator):
    """The same ids, but for the picture; the same pictures, but in a prompt of a length that NTK scales differently."""
    start = picture_prompt(100, seed=11)
    assert ask(engine, start).last.finish_reason == "length"
    other = Prompt(start.input_ids, start.image_slots, start.pixels + 1, [])
    for prompt in (other, longer(start, 100)):
        reply = ask(engine, prompt, SamplingOptions(max_new_tokens=12))
        assert [reply.text] == texts(run(generator, [prompt], SamplingOptions(max_new_tokens=12)))
        assert reply.last.cached_tokens == 0
    assert ask(engine, start).last.cached_tokens == 64


def test_kept_prompts_do_not_outgrow_their_room(engine):
    for seed in range(100, 120):
        assert ask(engine, text_prompt(120, seed)).last.cached_tokens == 0
    assert sum(past.shape[1] for past, _ in engine._reader.prefixes._pasts.values()) <= PREFIXES
    assert ask(engine, text_prompt(120, 119)).last.cached_tokens == 64
    assert ask(engine, text_prompt(120, 100)).last.cached_tokens == 0


def test_a_reply_may_fill_the_cache_to_its_end(engine, generator):
    prompt = text_prompt(LENGTH - 100)
    replies = [ask(engine, prompt, SamplingOptions(max_new_tokens=1000)) for _ in range(2)]
    expected = texts(run(generator, [prompt], SamplingOptions(max_new_tokens=100)))
    assert [reply.text for reply in replies] == expected * 2


def test_stop_tokens_and_stop_strings(engine, generator):
    prompt = text_prompt(30)
    tokens = run(generator, [prompt], SamplingOptions(max_new_tokens=40))[0]
    at = next(place for place in range(10, 40) if tokens[place] not in tokens[:place])
    by_token = ask(engine, prompt, SamplingOptions(max_new_tokens=40), stop_ids=(tokens[at],))
    assert by_token.text == texts([tokens[:at]])[0]
    assert (by_token.last.finish_reason, by_token.last.tokens) == ("stop", at + 1)
    whole = texts([tokens])[0]
    by_string = ask(engine, prompt, SamplingOptions(max_new_tokens=40, stop=[whole[13:17]]))
    assert by_string.text == whole[: whole.index(whole[13:17])]
    assert by_string.last.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(engine, generator):
    """Of the text's tokens alone, whatever a stop string cuts off."""
    prompt = text_prompt(30)
    option = SamplingOptions(max_new_tokens=8, logit_bias={5: 2.0}, temperature=0.7, seed=3)
    reply = ask(engine, prompt, option, alternatives=3)
    assert texts([[choice.token for choice in reply.tokens]]) == [reply.text]
    ids = prompt.input_ids
    for choice in reply.tokens:
        batch = generator.batch([Prompt(ids, np.full(len(ids), -1, np.int32), prompt.pixels, [])])
        valid = np.arange(batch.ids.shape[1])[None] < len(ids)
        logits = np.asarray(generator.logits(batch, valid, frequencies(generator.config, [30])))[0, len(ids) - 1]
        logprobs = logits - np.log(np.sum(np.exp(logits.astype(np.float64))))
        assert choice.logprob == pytest.approx(logprobs[choice.token], abs=2e-5)
        best = np.argsort(-logprobs)[:3]
        assert [token for token, _ in choice.alternatives] == best.tolist()
        assert [logprob for _, logprob in choice.alternatives] == pytest.approx(logprobs[best], abs=2e-5)
        ids = np.append(ids, np.int32(choice.token))
    cut = ask(engine, prompt, SamplingOptions(max_new_tokens=8, stop=["zz", reply.text[3:5]]), alternatives=0)
    assert texts([[choice.token for choice in cut.tokens]]) == [cut.text]


def test_a_bias_forces_and_bans(engine):
    prompt = text_prompt(20)
    plain = ask(engine, prompt, alternatives=0)
    first = plain.tokens[0].token
    forced = ask(engine, prompt, SamplingOptions(max_new_tokens=5, logit_bias={7: 100}))
    assert forced.text == TABLE[7].decode() * 5
    banned = ask(engine, prompt, SamplingOptions(max_new_tokens=5, logit_bias={first: -100}), alternatives=0)
    assert first not in [choice.token for choice in banned.tokens]


class Counting:
    """Allows 5, 6, 7, ... and after `most` of them the end, 300; fails at the token that is told."""

    def __init__(self, most: int, fails_at: int = 0):
        self.next, self.end, self.fails_at = 5, 5 + most, fails_at

    def allowed(self) -> np.ndarray:
        if self.next == self.fails_at:
            raise RuntimeError("too hard a grammar")
        return np.arange(320) == (300 if self.next == self.end else self.next)

    def accept(self, token: int) -> None:
        assert token == self.next
        self.next += 1


def test_a_constrained_reply_has_its_form_and_the_others_do_not_notice(engine, generator):
    prompt = text_prompt(30)
    option = SamplingOptions(max_new_tokens=40, temperature=0.9, seed=4)
    plain = [ask(engine, prompt, option) for _ in range(2)]
    # The least number of tokens does not keep it from its end.
    forced = SamplingOptions(max_new_tokens=40, min_new_tokens=40, temperature=0.9)
    bound = [ask(engine, prompt, forced, constraint=Counting(most), stop_ids=(300,)) for most in (3, 20)]
    failing = ask(engine, prompt, forced, constraint=Counting(20, fails_at=9), stop_ids=(300,))
    assert [reply.text for reply in bound] == texts([list(range(5, 8)), list(range(5, 25))])
    assert {reply.last.finish_reason for reply in bound} == {"stop"}
    assert [reply.text for reply in plain] == texts(run(generator, [prompt], option)) * 2
    assert "too hard a grammar" in failing.last.error


def test_a_row_is_free_two_turns_after_its_client_has_gone(engine, monkeypatch):
    turns, decode = [], LiveBatch.decode

    def counted(self, steps, speculate):
        turns.append(steps)
        return decode(self, steps, speculate)

    monkeypatch.setattr(LiveBatch, "decode", counted)
    listening = Listening()
    reply = engine.submit(Request(text_prompt(30), SamplingOptions(max_new_tokens=200)), listening)
    while not listening.updates:
        time.sleep(0.001)
    engine.cancel(reply)
    before = len(turns)
    while engine.running:
        time.sleep(0.001)
    assert len(turns) - before <= 2
    assert not listening.ended.is_set()


def test_a_turn_of_slow_steps_has_one(engine, monkeypatch):
    """So that text comes token by token. The first turns may still go by steps that were fast."""
    asked, decode, read = [], LiveBatch.decode, Engine._read
    running = []

    def noted(self, steps, speculate):
        asked.append(steps)
        running.append(steps)
        return decode(self, steps, speculate)

    def slow(self, report):
        if report.grown.tokens.shape[1] > 1:  # of decode steps
            time.sleep(0.05 * running.pop(0))
        read(self, report)

    monkeypatch.setattr(LiveBatch, "decode", noted)
    monkeypatch.setattr(Engine, "_read", slow)
    listening = ask(engine, text_prompt(30), SamplingOptions(max_new_tokens=24))
    assert listening.last.finish_reason == "length"
    assert set(asked[3:]) == {1}
    assert max(asked) <= 4
    assert all(len(update.text) == 1 for update in listening.updates[4:-1])


def test_who_is_cancelled_hears_nothing_and_the_others_do_not_notice(engine, generator):
    prompt = text_prompt(30)
    expected = texts(run(generator, [prompt], SamplingOptions(max_new_tokens=60)))[0]
    option = SamplingOptions(max_new_tokens=200)
    gone = []
    for number in range(12):
        listening = Listening()
        gone.append((listening, engine.submit(Request(text_prompt(40, number), option), listening)))
    stays = ask(engine, prompt, SamplingOptions(max_new_tokens=60))
    for _, reply in gone:
        engine.cancel(reply)
        engine.cancel(reply)
    assert stays.text == expected
    assert not any(listening.ended.is_set() for listening, _ in gone)


def test_a_row_is_clean_after_a_reply_that_was_no_numbers(engine, generator):
    """The next one in it is shorter, so that it does not write over all that was there."""
    option = SamplingOptions(max_new_tokens=40)
    for seed in range(3):
        broken = picture_prompt(120, seed=seed + 40, pictures=2)
        broken.pixels[:] = np.nan
        assert ask(engine, broken, option).last.finish_reason == "error"
        prompt = text_prompt(20, seed)
        assert [ask(engine, prompt, option).text] == texts(run(generator, [prompt], option))


def test_logits_that_are_no_numbers_end_their_own_reply(engine, generator):
    prompt = text_prompt(30)
    broken = picture_prompt(20, seed=1)
    broken.pixels[:] = np.nan
    other, bad, third = (ask(engine, each) for each in (prompt, broken, prompt))
    assert bad.last.finish_reason == "error"
    assert "no numbers" in bad.last.error
    assert other.text == third.text == texts(run(generator, [prompt], SamplingOptions(max_new_tokens=9)))[0]


def test_a_turn_that_fails_ends_its_replies_and_no_others(engine, monkeypatch):
    def failing(self, steps, speculate):
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    whole = ask(engine, text_prompt(30)).text
    monkeypatch.setattr(LiveBatch, "decode", failing)
    struck = ask(engine, text_prompt(30))
    assert struck.last.finish_reason == "error"
    assert "out of memory" in struck.last.error
    assert ask(engine, text_prompt(30)).text == whole
    assert engine.alive


@pytest.mark.parametrize("length", [0, LENGTH])
def test_a_prompt_without_room_is_refused(engine, length):
    with pytest.raises(UserError, match=f"the prompt has {length} tokens; 1 to {LENGTH - 1} are possible"):
        ask(engine, text_prompt(length))


def test_more_positions_than_the_model_has(generator):
    with pytest.raises(UserError, match="max_length is 257; the model has 256 positions"):
        Engine(generator, TABLE, EngineOptions(max_length=257))


def test_what_was_not_compiled_is_an_error_and_no_wait(engine):
    two = engine._generator.batch([text_prompt(3)] * 2, features=np.zeros((1, 4, 128), np.float32))
    with pytest.raises(NotCompiled, match="prefill.*was not compiled ahead"):
        engine._generator.prefill(two, controls([SamplingOptions()], [], 320))


def test_stopping_ends_what_is_in_progress_in_an_error(small_model):
    engine = Engine(Generator(small_model), TABLE, EngineOptions(slots=1, max_length=128))
    engine.warm_up()
    engine.start()
    replies = [ask(engine, text_prompt(10), SamplingOptions(max_new_tokens=110)) for _ in range(3)]
    engine.stop()
    assert {reply.last.finish_reason for reply in replies} <= {"error", "length"}
    assert replies[-1].last.error == "the engine was stopped"
    with pytest.raises(RuntimeError, match="stopped"):
        ask(engine, text_prompt(10))


def test_a_rest_is_no_standstill(engine):
    """Who watches the last step sees it stand still from when there is work, and not from the end of the last work."""
    engine.last_step -= 100
    before = time.monotonic()
    reply = ask(engine, text_prompt(10), SamplingOptions(max_new_tokens=1))
    assert engine.last_step >= before
    assert reply.ended.wait(60)


def test_work_that_is_not_begun_lets_the_last_step_stand(small_model):
    engine = Engine(Generator(small_model), TABLE, EngineOptions(slots=1, max_length=128))
    ask(engine, text_prompt(10))
    begun = engine.last_step
    ask(engine, text_prompt(10))
    assert (engine.last_step, engine.waiting) == (begun, 2)


def test_the_times_of_a_reply(engine, monkeypatch):
    """A prompt takes its time to read; who comes second waits for that."""
    read = engine._reader.read

    def slowly(replies):
        time.sleep(0.2)
        return read(replies)

    monkeypatch.setattr(engine._reader, "read", slowly)
    replies = [ask(engine, text_prompt(20, seed), SamplingOptions(max_new_tokens=9 - 8 * seed)) for seed in range(2)]
    times = [reply.last.times for reply in replies]
    assert all(each.queued <= each.begun <= each.first <= each.last for each in times)
    assert times[1].begun - times[1].queued > 0.1
    assert min(each.first - each.begun for each in times) > 0.1
    assert times[0].last > times[0].first
    assert times[1].last == times[1].first  # of one token
    assert all(update.times is None for reply in replies for update in reply.updates[:-1])
