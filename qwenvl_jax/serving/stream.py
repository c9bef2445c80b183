"""Server-sent events, and noticing that a client has gone away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment: clients ignore it, proxies see that the connection lives

SLOWEST_CLIENT = 60.0  # seconds in which a client must take an event, once the buffers before it are full

T = TypeVar("T")


class Disconnected(Exception):
    """The client went away."""


def event(content: Any) -> bytes:
    """One event. JSON has no line breaks outside of strings, and inside they are escaped."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(Response):
    """Sends `events` as they come, with comments where nothing comes for `ping_seconds`.

    resources: closed at the end, however it comes: the last event, an error, or the client going away, which calls
    `on_disconnect`.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        resources: contextlib.ExitStack,
        ping_seconds: float,
        on_disconnect: Callable[[], None],
    ):
        # The second header tells nginx to pass events on at once.
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._events = events
        self._resources = resources
        self._ping_seconds = ping_seconds
        self._on_disconnect = on_disconnect
        self._sending = asyncio.Lock()
        self._sent = 0.0  # when something was, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            try:
                await until_disconnect(receive, self._send_all(send))
            except Disconnected:
                self._on_disconnect()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.ensure_future(self._ping(send))
        try:
            async with contextlib.aclosing(self._events) as events:
                async for content in events:
                    await self._send(content, send)
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        self._sent = time.monotonic()
        while True:
            silent = time.monotonic() - self._sent
            if silent >= self._ping_seconds:
                await self._send(PING, send)
            else:
                await asyncio.sleep(self._ping_seconds - silent)

    async def _send(self, content: bytes, send: Send) -> None:
        try:
            async with asyncio.timeout(SLOWEST_CLIENT), self._sending:
                await send({"type": "http.response.body", "body": content, "more_body": True})
        except TimeoutError:
            raise Disconnected from None
        self._sent = time.monotonic()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, unless the client goes away before: then the work is cancelled and Disconnected raised.

    The body must have been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
