"""The border between the event loop and the engine's thread: requests go in, updates come out, in the order they came.

Updates that pile up while a client reads slowly are merged, so a slow client costs no memory beyond its own reply.
"""

import asyncio
import collections
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.requests import Listener, Request, Update
from qwenvl_jax.serving.errors import APIError, from_user_error, internal_error

SECONDS_BETWEEN_LOOKS = 1.0  # at an engine that says nothing: does it still live?


class Engine(Protocol):
    """What the server needs of an engine (`inference/engine.py`)."""

    max_length: int  # tokens of a prompt and its reply together

    @property
    def running(self) -> int: ...  # requests whose replies are being generated
    @property
    def waiting(self) -> int: ...  # requests submitted before, and not yet running
    @property
    def last_step(self) -> float: ...  # time.monotonic() of its loop's last turn, or since when it has work
    @property
    def alive(self) -> bool: ...
    @property
    def recompiles(self) -> int: ...  # programs compiled after the start
    @property
    def cache_usage(self) -> float: ...  # share of the cache that holds tokens
    @property
    def picture_hits(self) -> tuple[int, int]: ...  # pictures whose features were there, of all

    @property
    def prefix_hits(self) -> tuple[int, int]: ...  # tokens of prompts that needed no computing, of all

    # Returns at once; the listener is called in the engine's thread. Raises UserError for what cannot be answered.
    def submit(self, request: Request, listener: Listener) -> Any: ...
    def cancel(self, ticket: Any) -> None: ...
    def stop(self) -> None: ...


def engine_gone() -> APIError:
    """What is said of an engine whose thread has ended: nothing will answer until the server is started again."""
    return APIError(503, "server_error", "the engine has stopped; the server must be restarted", retry=False)


def timed_out() -> APIError:
    """What is said when the time for a whole answer is over."""
    return APIError(504, "timeout", "the answer took too long; ask for fewer tokens", retry=False)


class Replies:
    """The replies to the requests of one HTTP request. Made and read in the event loop.

    Iterating gives (number of the request, update), waits for the engine, and ends when every reply has ended. Raises
    APIError where the engine fails, at the deadline (time.monotonic()), or where `fail` was called. `cancel` must be
    called at the end, whatever happens.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], deadline: float):
        self._engine = engine
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._updates: collections.deque[tuple[int, Update]] = collections.deque()  # filled by the engine's thread
        self._arrived = asyncio.Event()
        self._error: APIError | None = None
        self._unfinished = len(requests)
        if not engine.alive:
            raise engine_gone()
        self._next_look = self._loop.call_later(0, self._look)
        self._tickets: list[Any] = []
        try:
            for number, request in enumerate(requests):
                self._tickets.append(engine.submit(request, functools.partial(self._listen, number)))
        except BaseException as error:
            self.cancel()
            if isinstance(error, UserError):
                raise from_user_error(error) from None
            raise

    def cancel(self) -> None:
        """Gives back what the engine holds for these requests; those that have ended are left alone."""
        self._next_look.cancel()
        for ticket in self._tickets:
            self._engine.cancel(ticket)

    def fail(self, error: APIError) -> None:
        """Lets the reader get `error` instead of more updates."""
        self._error = error
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        while self._unfinished:
            await self._arrived.wait()
            self._arrived.clear()
            if self._error is not None:
                raise self._error
            for number, update in self._take():
                if update.finish_reason == "error":
                    raise internal_error() from RuntimeError(update.error)
                self._unfinished -= update.finish_reason is not None
                yield number, update

    def _listen(self, number: int, update: Update) -> None:
        """Called in the engine's thread."""
        self._updates.append((number, update))
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would read
            self._loop.call_soon_threadsafe(self._arrived.set)

    def _look(self) -> None:
        """Once in a while: is there still time, and an engine? A timeout around every wait would cost more than it."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            self.fail(timed_out())
        elif not self._engine.alive and not self._updates:
            self.fail(engine_gone())
        else:
            self._next_look = self._loop.call_later(min(left, SECONDS_BETWEEN_LOOKS), self._look)

    def _take(self) -> list[tuple[int, Update]]:
        """All that has come, one update for each reply."""
        merged: dict[int, Update] = {}
        while self._updates:
            number, update = self._updates.popleft()
            merged[number] = _joined(merged[number], update) if number in merged else update
        return list(merged.items())


def _joined(first: Update, second: Update) -> Update:
    return Update(
        first.text + second.text,
        second.tokens,
        first.choices + second.choices,
        second.finish_reason,
        second.error,
        max(first.cached_tokens, second.cached_tokens),
    )
