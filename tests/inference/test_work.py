"""What an engine tells those that follow it: one that does it has the same batch, bit for bit, and the same memory.

Here leader and follower are in one process; tests/serving/test_hosts.py has two.
"""

import pickle
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from prompts import ask, longer, picture_prompt, text_prompt

from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.slots import LiveBatch

OPTIONS = EngineOptions(slots=4, max_length=128, pictures=2, prefixes=512, speculate=3)
TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}


class Told:
    """Keeps what a leader tells, in the form in which it travels."""

    def __init__(self) -> None:
        self.orders: list[bytes] = []
        self.reasons: list[str] = []

    @property
    def lost(self) -> bool:
        return bool(self.reasons)

    def tell(self, *order: object) -> None:
        self.orders.append(pickle.dumps(order))

    def give_up(self, reason: str) -> None:
        self.reasons.append(reason)


class Digits:
    """Allows 5, 6, 7, ... and fails when it is told to."""

    def __init__(self, fails_at: int):
        self.next, self.fails_at = 5, fails_at

    def allowed(self) -> np.ndarray:
        if self.next == self.fails_at:
            raise RuntimeError("too hard")
        return np.arange(320) == self.next

    def accept(self, token: int) -> None:
        self.next += 1


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def leader(small_model, told) -> Iterator[Engine]:
    engine = Engine(Generator(small_model), TABLE, OPTIONS, told)
    engine.warm_up()
    engine.start()
    yield engine
    engine.stop()


def test_a_follower_does_what_its_leader_does(leader, told, small_model, monkeypatch):
    """More requests than rows, pictures that come again, prompts that begin alike, forms, and all that may go wrong."""
    read = Engine._read

    def failing(self, report):
        monkeypatch.undo()
        raise RuntimeError("of this turn alone")

    broken = picture_prompt(60, seed=3)
    broken.pixels[:] = np.nan
    start = picture_prompt(70, seed=1)
    option = SamplingOptions(max_new_tokens=45, temperature=0.7, seed=2)
    asked = [ask(leader, prompt, option) for prompt in (start, broken, text_prompt(5), text_prompt(90, 4), start)]
    forms = [ask(leader, text_prompt(20), option, constraint=Digits(fails_at)) for fails_at in (0, 8)]
    gone = ask(leader, text_prompt(30, 7), SamplingOptions(max_new_tokens=90))
    assert [reply.last.finish_reason for reply in asked] == ["length", "error", "length", "length", "length"]
    assert [reply.last.finish_reason for reply in forms] == ["length", "error"]
    assert gone.last.finish_reason == "length"
    monkeypatch.setattr(Engine, "_read", failing)
    assert ask(leader, text_prompt(30)).last.error == "RuntimeError('of this turn alone')"
    assert Engine._read is read
    last = [ask(leader, longer(start, 10), option), ask(leader, picture_prompt(20, seed=9), option)]
    assert [reply.last.finish_reason for reply in last] == ["length", "length"]
    leader.stop()

    follower = Engine(Generator(small_model), TABLE, OPTIONS)
    follower.warm_up()
    orders = [pickle.loads(order) for order in told.orders]
    assert {order[0] for order in orders} == {
        "begin", "encode", "read", "put", "allow", "drop", "clear", "start", "decode", "note",
    }  # fmt: skip
    follower.follow(orders)
    for name in ("_past", "_state", "_fixed", "_prompts", "_most", "_used", "_asked"):
        mine, its = (getattr(engine._batches.batches[0], name) for engine in (follower, leader))
        jax.tree.map(np.testing.assert_array_equal, mine, its)
    assert (follower.running, follower.recompiles) == (0, 0)
    assert list(follower._reader.features._kept) == list(leader._reader.features._kept)
    assert list(follower._reader.prefixes._pasts) == list(leader._reader.prefixes._pasts)


def test_a_call_that_fails_ends_the_engine(leader, told, monkeypatch):
    """Nobody knows whether it has failed on the other hosts."""

    def failing(self, steps, speculate):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LiveBatch, "decode", failing)
    assert ask(leader, text_prompt(30)).last.finish_reason == "error"
    assert told.reasons == ["decode failed here, and may not have elsewhere: RuntimeError('out of memory')"]
    assert not leader.alive
    with pytest.raises(RuntimeError, match="stopped"):
        ask(leader, text_prompt(10))
