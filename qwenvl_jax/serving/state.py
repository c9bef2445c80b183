"""What all requests share: the model once it is loaded, who may come in, and how the server ends."""

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from qwenvl_jax.inference.grammar import Grammars
from qwenvl_jax.serving.errors import APIError
from qwenvl_jax.serving.logprobs import TokenTexts
from qwenvl_jax.serving.media import ImageLoader
from qwenvl_jax.serving.metrics import Metrics
from qwenvl_jax.serving.replies import Engine, Replies, engine_gone
from qwenvl_jax.serving.settings import Settings
from qwenvl_jax.vlm import VLM

MOST_DECODES = 8  # pictures decoded at one time, each of which may take hundreds of megabytes meanwhile
RETRY_SECONDS = (1, 30)  # least and most that a client is asked to wait for a place

T = TypeVar("T")
Status = Literal["loading", "ready", "draining", "stuck", "dead"]


class Server:
    """The state of one server. Only the event loop's thread changes it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.started = int(time.time())
        self.metrics = Metrics()
        self.load_image = ImageLoader(settings.image_limits, settings.allow_urls, settings.allowed_hosts)
        # The event loop stays free, the engine keeps a core, and what is slow to fetch holds up neither text nor data.
        workers = min(max((os.cpu_count() or 2) - 2, 2), 12)
        self._downloads = concurrent.futures.ThreadPoolExecutor(2 * workers, "qwenvl-downloads")
        self._pictures = concurrent.futures.ThreadPoolExecutor(min(workers, MOST_DECODES), "qwenvl-pictures")
        self._prompts = concurrent.futures.ThreadPoolExecutor(workers, "qwenvl-prompts")
        self.draining = False
        self._ending: APIError | None = None
        self._held = 0
        self._active: set[Replies] = set()
        self._usual_seconds = 1.0  # of an answer, a moving average
        self._vlm: VLM | None = None
        self._engine: Engine | None = None

    def install(self, vlm: VLM, engine: Engine) -> None:
        """The model is there: requests are taken from now on."""
        self.processor = copy.copy(vlm.processor)
        self.processor.load = _as_it_is
        self.token_texts = TokenTexts(vlm.processor.tokenizer)
        self._vlm, self._engine = vlm, engine
        self.metrics.watch(engine)

    @property
    def loaded(self) -> bool:
        return self._vlm is not None

    @property
    def vlm(self) -> VLM:
        assert self._vlm is not None  # `place` lets nobody in before
        return self._vlm

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What constrains replies to a form. Made when it is first asked for, in a second for a large vocabulary."""
        tokenizer = self.vlm.processor.tokenizer
        return Grammars(tokenizer, self.vlm.config.vocab_size, tokenizer.im_end_id)

    @property
    def max_length(self) -> int | None:
        """Tokens of a prompt and its reply together, once the model is there."""
        return None if self._engine is None else self._engine.max_length

    @property
    def status(self) -> Status:
        engine = self._engine
        if engine is not None and not engine.alive:
            return "dead"
        if engine is not None and (engine.running or engine.waiting) and self._stands_still(engine):
            return "stuck"
        if self.draining:
            return "draining"
        return "loading" if engine is None else "ready"

    def _stands_still(self, engine: Engine) -> bool:
        return time.monotonic() - engine.last_step > self.settings.stall_seconds

    async def with_downloads(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` in a thread that may wait for others' servers."""
        return await asyncio.get_running_loop().run_in_executor(self._downloads, function, *arguments)

    async def with_pictures(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` in a thread for pictures, of which there are few.

        Who is cancelled while it waits for one leaves the queue. What runs already runs on, and keeps its thread.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pictures, function, *arguments)

    async def with_prompts(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` in a thread for text."""
        return await asyncio.get_running_loop().run_in_executor(self._prompts, function, *arguments)

    def close(self) -> None:
        """Ends the threads once they are done."""
        for pool in (self._downloads, self._pictures, self._prompts):
            pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def place(self) -> Iterator["Place"]:
        """A place for one reply, before anything of a request is read. Raises APIError where there is none."""
        match self.status:
            case "loading":
                raise APIError(503, "server_error", "the model is being loaded; try again soon", retry_after=5)
            case "stuck":
                raise APIError(
                    503, "server_error", "the engine does not get on; see /health", retry_after=RETRY_SECONDS[1]
                )
            case "draining":
                raise APIError(503, "server_error", "the server is shutting down", retry_after=5)
            case "dead":
                raise engine_gone()
        place = Place(self)
        place.take(1)
        began = time.monotonic()
        try:
            yield place
        finally:
            self._held -= place.taken
            self._usual_seconds += 0.1 * (time.monotonic() - began - self._usual_seconds)

    @contextlib.contextmanager
    def replies(self, replies: Replies) -> Iterator[None]:
        """Keeps `replies` under watch until they are read, and cancels what is left of them then."""
        self._active.add(replies)
        try:
            yield
        finally:
            self._active.discard(replies)
            replies.cancel()

    def adapter(self, name: str) -> int:
        """The engine's number of the adapter of that name; 0 for the model itself."""
        return self.settings.adapters.index(name) + 1 if name in self.settings.adapters else 0

    def note_disconnect(self) -> None:
        """A client went away before the end of its answer."""
        self.metrics.disconnects.inc()

    def check_not_ending(self) -> None:
        """Raises APIError where the time of draining is over."""
        if self._ending is not None:
            raise self._ending

    async def drain(self) -> None:
        """Takes no new requests and waits for those under way, but not for ever; ends the rest with an error."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self._held:
                    await asyncio.sleep(0.05)
        self._ending = APIError(503, "server_error", "the server shut down before the answer was complete")
        for replies in self._active:
            replies.fail(self._ending)

    def _take(self, number: int) -> None:
        engine = self.engine
        # The engine may for a moment hold more than is asked for: what was cancelled and is not yet gone.
        if max(self._held, engine.running + engine.waiting) + number > self.settings.max_queue:
            self.metrics.rejected.inc()
            least, most = RETRY_SECONDS
            seconds = min(max(math.ceil(self._usual_seconds), least), most)
            raise APIError(
                429,
                "rate_limit_exceeded",
                f"all {self.settings.max_queue} places are taken; try again in {seconds} s",
                retry_after=seconds,
            )
        self._held += number


def _as_it_is(picture: Any) -> Any:
    """Pictures come to the processor loaded and resized."""
    return picture


class Place:
    """Places that one HTTP request holds in a server."""

    def __init__(self, server: Server):
        self._server = server
        self.taken = 0

    def take(self, number: int) -> None:
        """More places. Raises APIError where there are not so many."""
        most = self._server.settings.max_queue
        if self.taken + number > most:
            raise APIError(
                400, "invalid_value", f"n: {self.taken + number} replies, this server has {most} places", "n"
            )
        self._server._take(number)
        self.taken += number
