"""What an engine's thread says and what a request reads of it."""

import asyncio
import threading
import time

import pytest

from qwenvl_jax.inference.requests import Times, TokenChoice, Update
from qwenvl_jax.serving.errors import APIError
from qwenvl_jax.serving.replies import Replies

TIMES = Times(1.0, 2.0, 3.0, 4.0)


class Engine:
    """Keeps the listeners; `alive` as a test wants it."""

    def __init__(self, alive: bool = True):
        self.alive = alive
        self.listeners = []
        self.cancelled = []

    def submit(self, request, listener):
        self.listeners.append(listener)
        return len(self.listeners)

    def cancel(self, ticket):
        self.cancelled.append(ticket)


def read(
    engine: Engine, requests: int = 1, seconds: float = 5, before=lambda replies: None
) -> list[tuple[int, Update]]:
    async def run():
        replies = Replies(engine, [None] * requests, time.monotonic() + seconds)
        before(replies)
        return [update async for update in replies]

    return asyncio.run(run())


def test_what_piles_up_is_merged():
    """A client that reads slowly costs no more than its reply."""
    engine = Engine()
    choice = TokenChoice(1, -0.5, ())

    def speak(_):
        for number in range(1, 1001):
            engine.listeners[0](Update("a", number, (choice,), cached_tokens=3 * (number == 1)))
            engine.listeners[1](Update("b", number))
        for listener in engine.listeners:
            listener(Update("", 1000, finish_reason="stop", times=TIMES))

    first, second = read(engine, 2, before=speak)
    assert first == (0, Update("a" * 1000, 1000, (choice,) * 1000, "stop", None, 3, TIMES))
    assert second == (1, Update("b" * 1000, 1000, (), "stop", times=TIMES))


def test_updates_come_from_another_thread():
    engine = Engine()

    def speak(_):
        def later():
            for number in range(1, 6):
                time.sleep(0.01)
                engine.listeners[0](Update(str(number), number, finish_reason="length" if number == 5 else None))

        threading.Thread(target=later).start()

    assert "".join(update.text for _, update in read(engine, before=speak)) == "12345"


def test_an_error_is_not_shown():
    engine = Engine()
    with pytest.raises(APIError) as raised:
        read(engine, before=lambda _: engine.listeners[0](Update("", 1, finish_reason="error", error="/etc/secret")))
    assert raised.value.status == 500
    assert "secret" not in str(raised.value.body)
    assert "secret" in str(raised.value.__cause__)


def test_an_engine_that_has_stopped_takes_nothing():
    engine = Engine(alive=False)
    with pytest.raises(APIError) as raised:
        read(engine)
    assert raised.value.status == 503
    assert not engine.listeners


def test_an_engine_that_stops_is_noticed():
    engine = Engine()
    with pytest.raises(APIError) as raised:
        read(engine, before=lambda _: setattr(engine, "alive", False))
    assert raised.value.status == 503


def test_the_deadline():
    with pytest.raises(APIError) as raised:
        read(Engine(), seconds=0.05)
    assert raised.value.status == 504


def test_a_reader_can_be_told_to_stop():
    error = APIError(503, "server_error", "over")
    with pytest.raises(APIError) as raised:
        read(Engine(), before=lambda replies: replies.fail(error))
    assert raised.value is error


def test_what_was_submitted_is_cancelled_when_the_rest_cannot_be():
    engine = Engine()

    def refuse(request, listener, submit=engine.submit):
        if len(engine.listeners) == 2:
            raise RuntimeError("no more")
        return submit(request, listener)

    engine.submit = refuse
    with pytest.raises(RuntimeError):
        read(engine, 3)
    assert engine.cancelled == [1, 2]
