"""Requests to what the engine takes: prompts of tokens and pixels, and sampling options.

Pictures and long texts take their time and are read in worker threads; the rest runs in the event loop.
"""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.processing.data_uri import is_data_uri
from qwenvl_jax.processing.images import Resized, picture_key, resized
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.serving import react
from qwenvl_jax.serving.errors import APIError, from_user_error
from qwenvl_jax.serving.media import ImageError
from qwenvl_jax.serving.messages import ImagePart, Message, TextPart
from qwenvl_jax.serving.react import Tool
from qwenvl_jax.serving.schema import Sampling
from qwenvl_jax.serving.state import Server

T = TypeVar("T")
NO_WINDOW = 2**31 - 1  # old turns are never left out: a prompt that is too long is refused
SMALLEST_TOP_P = 1e-6  # stands for 0, which OpenAI's API allows: the most likely token alone

_RENAMED = {"min_tokens": "min_new_tokens", "stop_token_ids": "stop_ids"}  # ours of the engine's names for fields
_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stop", "stop_token_ids", "min_tokens"),
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prompt with what is reported and cached of it."""

    prompt: Prompt
    image_tokens: int
    picture_keys: tuple[bytes, ...] = ()
    begun: str = ""  # what the prompt has of the reply already

    @property
    def tokens(self) -> int:
        return len(self.prompt.input_ids)


async def from_messages(messages: Sequence[Message], server: Server, tools: Sequence[Tool] = ()) -> Prepared:
    """The prompt of a conversation, its pictures loaded. Raises APIError that names the part."""
    parts = [
        (f"messages.{i}.content.{j}", part)
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content or ())
    ]
    _check_size((part.text for _, part in parts if isinstance(part, TextPart)), server, "messages")
    urls = {f"{place}.image_url.url": part.image_url.url for place, part in parts if isinstance(part, ImagePart)}
    most = server.settings.max_images
    if len(urls) > most:
        message = f"messages: {len(urls)} pictures; this server takes {most}, those of old turns included"
        raise APIError(400, "too_many_images", message, "messages")
    began = time.monotonic()
    pictures = await asyncio.gather(*(_picture(place, url, server) for place, url in urls.items()))
    if pictures:
        server.metrics.images.observe(time.monotonic() - began)
    return await server.with_prompts(_of_conversation, messages, pictures, server, tools)


async def _picture(place: str, url: str, server: Server) -> Resized:
    source: str | bytes = url
    if server.settings.allow_urls and not is_data_uri(url.strip()):
        source = await server.with_downloads(_checked, place, server, server.load_image.content, url)
    return await server.with_pictures(_checked, place, server, _seen, source, server)


def _seen(source: str | bytes, server: Server) -> Resized:
    """The picture at the model's size: a large one is gone before the next is decoded."""
    return resized(server.load_image(source), server.vlm.config.visual.image_size)


def _checked(place: str, server: Server, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, whose ImageError is an APIError that names the place."""
    try:
        return function(*arguments)
    except ImageError as error:
        server.metrics.image_rejected.labels(error.code).inc()
        raise APIError(400, error.code, f"{place}: {error}", place) from None


def _of_conversation(
    messages: Sequence[Message], pictures: Sequence[Resized], server: Server, tools: Sequence[Tool]
) -> Prepared:
    left = iter(pictures)
    conversation: list[dict[str, Any]] = []
    begun = ""
    if tools or any(message.role in ("tool", "function") or _calls(message) for message in messages):
        try:
            conversation, begun = react.conversation([_turn(message, left) for message in messages], tools)
        except ValueError as error:
            number, _, problem = str(error).partition(" ")
            raise APIError(400, "invalid_value", f"messages.{number}: {problem}", f"messages.{number}") from None
    else:
        for message in messages:
            role = "system" if message.role == "developer" else message.role
            conversation.append({"role": role, "content": _parts(message, left)})
    try:
        prompt = server.processor.chat(conversation, NO_WINDOW, begun)
    except UserError as error:
        raise from_user_error(error) from None
    image_tokens = len(prompt.pixels) * server.processor.tokenizer.n_queries
    return Prepared(prompt, image_tokens, tuple(map(picture_key, prompt.pixels)), begun)


def _parts(message: Message, pictures: Iterator[Resized]) -> list[dict[str, Any]]:
    """The parts of a message in the form of a processor, pictures in place of their URLs."""
    parts: list[dict[str, Any]] = []
    for part in message.content or ():
        shown = isinstance(part, ImagePart)
        parts.append({"type": "image", "image": next(pictures)} if shown else part.model_dump(exclude_none=True))
    return parts


def _calls(message: Message) -> list[tuple[str, react.Call]]:
    """The calls of an assistant's message with their ids. The older form has one, without an id."""
    if message.role != "assistant":
        return []
    calls = [(call.id, call.function) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append((react.new_id(), message.function_call))
    return [(call_id, react.Call(function.name, function.arguments)) for call_id, function in calls]


def _turn(message: Message, pictures: Iterator[Resized]) -> react.Turn:
    match message.role:
        case "user":
            return react.Turn("user", tuple(_parts(message, pictures)))
        case "system" | "developer":
            return react.Turn("system", tuple(_parts(message, pictures)))
    text = "".join(part.text for part in message.content or () if isinstance(part, TextPart))
    if message.role == "assistant":
        return react.Turn("assistant", text=text, calls=tuple(_calls(message)))
    call_id = message.tool_call_id if message.role == "tool" else None
    return react.Turn("tool", text=text, call_id=call_id)


def from_text(text: str | Sequence[int], server: Server, param: str) -> Prepared:
    """The prompt of a plain text or of token ids. Nothing in a text counts as a special token."""
    tokenizer = server.vlm.processor.tokenizer
    if isinstance(text, str):
        _check_size([text], server, param)
        try:
            ids = tokenizer.encode_ordinary(text)
        except UserError as error:
            raise APIError(400, "invalid_value", f"{param}: {error}", param) from None
    else:
        ids = list(text)
        if max(ids, default=0) >= tokenizer.n_vocab:
            message = f"{param}: token {max(ids)} is not in the vocabulary (0 to {tokenizer.n_vocab - 1})"
            raise APIError(400, "invalid_value", message, param)
    if not ids:
        raise APIError(400, "invalid_value", f"{param}: empty; give it at least one token", param)
    side = server.vlm.config.visual.image_size
    no_pictures = np.zeros((0, 3, side, side), np.float32)
    prompt = Prompt(np.array(ids, np.int32), np.full(len(ids), -1, np.int32), no_pictures, [])
    return Prepared(prompt, 0)


def _check_size(texts: Iterable[str], server: Server, param: str) -> None:
    """Refuses what cannot fit, without the minutes and the memory that millions of tokens take. Raises APIError."""
    # Normalisation may make three bytes of nine.
    least = sum(len(text.encode()) for text in texts) // (3 * server.token_texts.longest)
    if least > server.engine.max_length:
        message = f"{param}: more than {least} tokens of text; this model takes {server.engine.max_length}; shorten it"
        raise APIError(400, "context_length_exceeded", message, param)


def options(body: Sampling, prepared: Prepared, server: Server) -> list[SamplingOptions]:
    """Options of the n replies to a prompt. Raises APIError where the prompt and its reply do not fit the model."""
    room = _room(body, prepared, server)
    given = {_RENAMED.get(name, name): getattr(body, name) for name in _FIELDS if getattr(body, name) is not None}
    if "top_p" in given:
        given["top_p"] = max(given["top_p"], SMALLEST_TOP_P)
    if given.get("top_k") == -1:  # vLLM's way to switch it off
        given["top_k"] = 0
    if body.logit_bias:
        given["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    most_tokens = body.most_tokens or room
    vocabulary = server.vlm.config.vocab_size
    for name in ("stop_ids", "logit_bias"):
        beyond = max(given.get(name, ()), default=0)
        if beyond >= vocabulary:
            field = "stop_token_ids" if name == "stop_ids" else name
            message = f"{field}: token {beyond} is not in the vocabulary (0 to {vocabulary - 1})"
            raise APIError(400, "invalid_value", message, field)
    least = given.get("min_new_tokens", 0)
    if least > most_tokens:
        message = f"min_tokens: {least} is more than the {most_tokens} tokens that the reply may have"
        raise APIError(400, "invalid_value", message, "min_tokens")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    try:
        first = server.vlm.defaults.replace({"min_new_tokens": 0, **given, "max_new_tokens": most_tokens})
        return [first.replace({"seed": (seed + number) % 2**64}) for number in range(body.replies)]
    except UserError as error:
        raise from_user_error(error) from None


def _room(body: Sampling, prepared: Prepared, server: Server) -> int:
    """How many tokens a reply may have at most."""
    limit = server.engine.max_length
    room = limit - prepared.tokens
    if room < (body.most_tokens or 1):
        text_tokens = prepared.tokens - prepared.image_tokens
        message = (
            f"this model takes {limit} tokens, prompt and reply together, and the prompt has {prepared.tokens} "
            f"({text_tokens} of text, {prepared.image_tokens} of pictures)"
        )
        if body.most_tokens is not None:
            message += f", the reply was given {body.most_tokens}"
        fits = room >= 1  # without so long a reply
        advice = "; lower max_tokens" if fits else "; shorten it"
        prompt_field = "messages" if "messages" in type(body).model_fields else "prompt"
        raise APIError(400, "context_length_exceeded", message + advice, "max_tokens" if fits else prompt_field)
    return room
