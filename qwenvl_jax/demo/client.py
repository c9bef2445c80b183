"""The page as a client of OpenAI's API: one streamed answer, what the model's card says, and errors in words.

Any server will do. Nothing here knows the model or Gradio.
"""

import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import openai

SECONDS_TO_CONNECT = 5
SECONDS_SILENT = 120  # between two pieces of an answer; servers send comments meanwhile, which do not count
BETWEEN_UPDATES = 0.05  # seconds: what comes faster is shown together, or the page would do nothing but redraw
LONGEST_MESSAGE = 400  # characters of what a server says
OURS = "qwenvl-jax"  # who owns the models of this project's server


class AskError(Exception):
    """Why there is no answer, or no more of it.

    kind: which sentence of `texts.py` says it, completed by `details`. param: the field of the request that is wrong.
    """

    def __init__(self, kind: str, param: str = "", **details: Any):
        super().__init__(kind, details)
        self.kind = kind
        self.param = param
        self.details = details


@dataclasses.dataclass(frozen=True)
class Card:
    """What a server says of its first model. defaults: of sampling, by the names of a request's fields."""

    name: str
    ours: bool = False
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A reply so far. finish: why it ended, in OpenAI's words; None while it grows. Times in seconds since Send."""

    text: str = ""
    finish: str | None = None
    request_id: str = ""
    first: float | None = None
    last: float | None = None
    prompt_tokens: int | None = None
    picture_tokens: int | None = None
    tokens: int | None = None


class Client:
    """Asks the server at `base_url` (with `/v1`); `key` where it wants one, `model` where it has several."""

    def __init__(self, base_url: str, key: str | None = None, model: str | None = None):
        self.base_url = base_url.rstrip("/")
        self.key = key
        self._model = model
        self._card: Card | None = None
        timeout = openai.Timeout(SECONDS_SILENT, connect=SECONDS_TO_CONNECT)
        self._openai = openai.AsyncOpenAI(base_url=self.base_url, api_key=key or "none", max_retries=0, timeout=timeout)

    async def card(self) -> Card | None:
        """The model that is asked, or None while the server loads it. Raises AskError, also where it is not there."""
        if self._card is None:
            try:
                models = (await self._openai.models.list()).data
            except openai.InternalServerError:
                return None
            except openai.OpenAIError as error:
                raise self._in_words(error) from error
            wanted = [model for model in models if self._model in (None, model.id)]
            if not wanted:
                raise AskError("no_model", name=self._model or "", names=", ".join(model.id for model in models))
            card = Card(wanted[0].id, wanted[0].owned_by == OURS, getattr(wanted[0], "generation_config", None) or {})
            if card.ours and not card.defaults:  # its names are known before the model is there
                return None
            self._card = card
        return self._card

    async def ask(self, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """The answer to a request, growing, at last with `finish`. Raises AskError, in the middle of it, too.

        The connection is closed when the caller stops to iterate, by which a server frees its slot.
        """
        began = time.perf_counter()
        answer = Answer()
        shown, begun = 0.0, False
        try:
            stream = await self._openai.chat.completions.create(
                model=body["model"], messages=body["messages"], stream=True, extra_body=dict(body)
            )
            begun = True
            async with stream:
                answer = dataclasses.replace(answer, request_id=stream.response.headers.get("x-request-id", ""))
                async for chunk in stream:
                    now = time.perf_counter() - began
                    answer = _grown(answer, chunk, now)
                    if answer.text and now - shown >= BETWEEN_UPDATES:
                        shown = now
                        yield dataclasses.replace(answer, finish=None)
        except Exception as error:
            cut_off = isinstance(error, openai.APIConnectionError) and begun
            raise AskError("cut_off") if cut_off else self._in_words(error) from error
        if answer.finish is None:
            raise AskError("cut_off")
        yield answer

    def _in_words(self, error: Exception) -> AskError:
        message = _sentence(error)
        code = getattr(error, "code", None)
        headers = getattr(getattr(error, "response", None), "headers", {})
        match error:
            case openai.APITimeoutError():
                return AskError("slow", base=self.base_url)
            case openai.APIConnectionError():
                return AskError("lost", base=self.base_url)
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return AskError("key", base=self.base_url)
            case openai.RateLimitError():
                return AskError("busy", seconds=headers.get("retry-after", "?"))
            case openai.APIStatusError(status_code=413):
                return AskError("too_large", message=message)
            case openai.BadRequestError() if code == "context_length_exceeded":
                return AskError("too_long", message=message)
            case openai.APIStatusError():
                return AskError("refused", error.param or "", message=message)
            case openai.APIError():  # an event in the stream
                return AskError("failed", message=message)
            case _ if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "anyio"):
                return AskError("cut_off")  # the transport's own, when a connection ends in the middle
        raise error


def _grown(answer: Answer, chunk: Any, now: float) -> Answer:
    changes: dict[str, Any] = {}
    for choice in chunk.choices[:1]:
        piece = choice.delta.content or ""
        changes["text"] = answer.text + piece
        if piece:
            changes["last"] = now
            if answer.first is None:
                changes["first"] = now
        if choice.finish_reason:
            changes["finish"] = choice.finish_reason
    if chunk.usage is not None:
        details = chunk.usage.prompt_tokens_details
        changes["prompt_tokens"] = chunk.usage.prompt_tokens
        changes["tokens"] = chunk.usage.completion_tokens
        changes["picture_tokens"] = getattr(details, "image_tokens", None)
    return dataclasses.replace(answer, **changes)


def _sentence(error: Exception) -> str:
    """A server's words, bounded, without openai's "Error code: 400 - " before them."""
    body = getattr(error, "body", None)
    told = body.get("message") if isinstance(body, dict) else None
    return str(told or getattr(error, "message", "") or error)[:LONGEST_MESSAGE]
