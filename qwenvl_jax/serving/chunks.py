"""Replies as lists of choices, as chat and completions both have them: in chunks of a stream, or all at once."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from qwenvl_jax.serving.answer import Piece
from qwenvl_jax.serving.errors import APIError
from qwenvl_jax.serving.stream import DONE, event

Json = dict[str, Any]


class ChoiceForm(Protocol):
    """How a route writes a choice; `head` has the fields that all its JSON has in common."""

    head: Json

    def opening(self, index: int) -> Json | None: ...  # a choice of the first chunk of a reply
    def chunk(self, piece: Piece) -> Json | None: ...  # a choice of a chunk, or nothing yet
    def whole(self, piece: Piece) -> Json: ...  # a choice of a reply in one
    def name(self, stream: bool) -> str: ...  # `object`


class Choices:
    """The form of an answer with `replies` choices. include_usage: a stream's last chunk has the numbers of tokens."""

    def __init__(self, form: ChoiceForm, replies: int, include_usage: bool):
        self._form, self._replies = form, replies
        self._include_usage = include_usage
        self._chunk_head = {**form.head, "object": form.name(stream=True)}

    def opening(self) -> Iterator[bytes]:
        for index in range(self._replies):
            yield from self._event(self._form.opening(index))

    def grown(self, piece: Piece) -> Iterator[bytes]:
        return self._event(self._form.chunk(piece))

    def ending(self, usage: Json) -> Iterator[bytes]:
        if self._include_usage:
            yield event({**self._chunk_head, "choices": [], "usage": usage})
        yield DONE

    def failed(self, error: APIError) -> Iterator[bytes]:
        yield event(error.body)
        yield DONE

    def whole(self, replies: Sequence[Piece], usage: Json) -> Json:
        choices = [self._form.whole(piece) for piece in replies]
        return {**self._form.head, "object": self._form.name(stream=False), "choices": choices, "usage": usage}

    def _event(self, choice: Json | None) -> Iterator[bytes]:
        if choice is not None:
            no_usage = {"usage": None} if self._include_usage else {}
            yield event({**self._chunk_head, "choices": [choice], **no_usage})
