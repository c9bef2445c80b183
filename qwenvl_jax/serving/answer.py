"""The way of a request that generates, the same for chat and completions: in, through the engine, and out.

Everything that is the client's mistake is found before a reply starts, also that of a stream. The form of what is sent
is the route's.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request as HTTPRequest
from fastapi import Response

from qwenvl_jax.inference.requests import Request, TokenChoice, Update
from qwenvl_jax.serving.body import check_model, read
from qwenvl_jax.serving.encoding import JSONReply
from qwenvl_jax.serving.errors import APIError, internal_error
from qwenvl_jax.serving.logprobs import Aligner
from qwenvl_jax.serving.metrics import Metrics
from qwenvl_jax.serving.middleware import Record, record_of
from qwenvl_jax.serving.prompts import Prepared
from qwenvl_jax.serving.replies import Replies, timed_out
from qwenvl_jax.serving.schema import Sampling
from qwenvl_jax.serving.state import Server
from qwenvl_jax.serving.stream import DONE, Disconnected, EventStream, event, until_disconnect

log = logging.getLogger("qwenvl.requests")
Body = TypeVar("Body", bound=Sampling)
Json = dict[str, Any]


@dataclasses.dataclass
class Piece:
    """What one reply has grown by. texts: of the tokens in `choices`. offset: characters of the reply before it."""

    index: int
    text: str
    texts: list[str]
    choices: Sequence[TokenChoice]
    offset: int
    finish_reason: str | None


class Form(Protocol):
    """How a route writes what it sends; `head` has the fields that all its JSON has in common."""

    head: Json

    def opening(self, index: int) -> Json | None: ...  # a choice of the first chunk of a reply
    def chunk(self, piece: Piece) -> Json | None: ...  # a choice of a chunk, or nothing yet
    def whole(self, piece: Piece) -> Json: ...  # a choice of a reply in one
    def name(self, stream: bool) -> str: ...  # `object`


@dataclasses.dataclass
class Job:
    """A request that is ready for the engine. prompts: each gets as many replies, one after another in `requests`."""

    prompts: list[Prepared]
    requests: list[Request]
    form: Form
    stream: bool
    include_usage: bool


class Progress:
    """Numbers of a request's replies while they come, for usage, metrics and the log."""

    def __init__(self, job: Job, record: Record, metrics: Metrics):
        self._job = job
        self._record = record
        self._metrics = metrics
        self._tokens = [0] * len(job.requests)
        self._latest: list[float | None] = [None] * len(job.requests)  # when the newest token came
        self._cached = [0] * len(job.requests)
        self._prompt_tokens = sum(prepared.tokens for prepared in job.prompts)
        self._image_tokens = sum(prepared.image_tokens for prepared in job.prompts)
        record.stream, record.prompt_tokens = job.stream, self._prompt_tokens
        record.images = sum(len(prepared.prompt.pixels) for prepared in job.prompts)
        metrics.prompt_tokens.inc(self._prompt_tokens)
        metrics.image_tokens.inc(self._image_tokens)
        metrics.request_n.observe(len(job.requests) // len(job.prompts))
        metrics.request_max_tokens.observe(job.requests[0].options.max_new_tokens)
        for prepared in job.prompts:
            metrics.request_prompt_tokens.observe(prepared.tokens)

    def note(self, index: int, update: Update) -> None:
        """An update came."""
        now, metrics, record = time.monotonic(), self._metrics, self._record
        new = update.tokens - self._tokens[index]
        self._cached[index] = max(self._cached[index], update.cached_tokens)
        if new > 0:
            latest = self._latest[index]
            if record.first_token_seconds is None:
                record.first_token_seconds = round(now - record.arrived, 4)
                metrics.first_token.observe(now - record.arrived)
            elif latest is not None:
                for _ in range(new):
                    metrics.between_tokens.observe((now - latest) / new)
            self._latest[index] = now
            self._tokens[index] = update.tokens
            metrics.generation_tokens.inc(new)
            record.completion_tokens += new
        if update.finish_reason is not None:
            metrics.success.labels(update.finish_reason).inc()
            metrics.request_generation_tokens.observe(update.tokens)
            metrics.whole.observe(now - record.arrived)

    def usage(self) -> Json:
        """OpenAI's `usage`. A prompt counts once, however many replies it gets."""
        replies = len(self._tokens) // len(self._job.prompts)
        completion = sum(self._tokens)
        starts = range(0, len(self._cached), replies)
        cached = sum(max(self._cached[start : start + replies]) for start in starts)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {
                "image_tokens": self._image_tokens,
                "text_tokens": self._prompt_tokens - self._image_tokens,
                "cached_tokens": cached,
            },
        }


async def answer(
    request: HTTPRequest, schema: type[Body], prepare: Callable[[Body, Server], Coroutine[Any, Any, Job]]
) -> Response:
    """The response to a request for replies; `prepare` makes of its body what the engine gets."""
    server: Server = request.app.state.server
    record = record_of(request.scope)
    deadline = record.arrived + server.settings.request_timeout
    with contextlib.ExitStack() as resources:
        place = resources.enter_context(server.place())
        try:
            body = await read(request, schema, server)
            check_model(body.model, server)
            body.check_together()
            place.take(body.requests - 1)
            job = await _before(deadline, until_disconnect(request.receive, prepare(body, server)))
            server.check_not_ending()
            replies = Replies(server.engine, job.requests, deadline)
            resources.enter_context(server.replies(replies))
            progress = Progress(job, record, server.metrics)
            pieces = _pieces(replies, job, progress, server)
            if job.stream:
                events = _events(pieces, job, progress, server, record)
                return EventStream(events, resources.pop_all(), server.settings.ping_seconds, server.note_disconnect)
            return JSONReply(await until_disconnect(request.receive, _whole(pieces, job, progress)))
        except Disconnected:
            server.note_disconnect()
            return Response(status_code=499)  # for the log: nobody reads it
        except APIError as error:
            _note_failure(error, server, record)
            raise


async def _before(deadline: float, work: Coroutine[Any, Any, Job]) -> Job:
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
            return await work
    except TimeoutError:
        raise timed_out() from None


def _note_failure(error: APIError, server: Server, record: Record) -> None:
    record.error = error.code
    if error.status >= 500:
        server.metrics.failures.labels(str(error.code)).inc()
    if error.__cause__ is not None:
        fields = {"request_id": record.request_id, "reason": str(error.__cause__)}
        log.error("generation failed", extra={"fields": fields})


async def _pieces(replies: Replies, job: Job, progress: Progress, server: Server) -> AsyncIterator[Piece]:
    aligners = [Aligner(server.token_texts) if wanted.alternatives is not None else None for wanted in job.requests]
    offsets = [0] * len(job.requests)
    async for index, update in replies:
        progress.note(index, update)
        aligner = aligners[index]
        texts = [] if aligner is None else aligner.split(update.text, update.choices)
        yield Piece(index, update.text, texts, update.choices, offsets[index], update.finish_reason)
        offsets[index] += len(update.text)


async def _whole(pieces: AsyncIterator[Piece], job: Job, progress: Progress) -> Json:
    parts: list[list[Piece]] = [[] for _ in job.requests]
    async for piece in pieces:
        parts[piece.index].append(piece)
    choices = [job.form.whole(_joined(own)) for own in parts]
    return {**job.form.head, "object": job.form.name(stream=False), "choices": choices, "usage": progress.usage()}


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [text for piece in pieces for text in piece.texts],
        [choice for piece in pieces for choice in piece.choices],
        0,
        pieces[-1].finish_reason,
    )


async def _events(
    pieces: AsyncIterator[Piece], job: Job, progress: Progress, server: Server, record: Record
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; one that fails ends with an event that says so."""
    form = job.form
    head = {**form.head, "object": form.name(stream=True)}
    no_usage = {"usage": None} if job.include_usage else {}
    try:
        for index in range(len(job.requests)):
            opening = form.opening(index)
            if opening is not None:
                yield event({**head, "choices": [opening], **no_usage})
        async for piece in pieces:
            chunk = form.chunk(piece) if piece.text or piece.choices or piece.finish_reason else None
            if chunk is not None:
                yield event({**head, "choices": [chunk], **no_usage})
        if job.include_usage:
            yield event({**head, "choices": [], "usage": progress.usage()})
    except APIError as error:
        _note_failure(error, server, record)
        yield event(error.body)
    except Exception:
        log.exception("a stream failed", extra={"fields": {"request_id": record.request_id}})
        _note_failure(internal_error(), server, record)
        yield event(internal_error().body)
    yield DONE
