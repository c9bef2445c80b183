"""How a reply is written as OpenAI's Response: one object, or the typed events of a stream."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.serving import react
from qwenvl_jax.serving.answer import Piece
from qwenvl_jax.serving.errors import APIError
from qwenvl_jax.serving.responses_schema import ResponsesRequest

Json = dict[str, Any]


class ResponseForm:
    """Writes the one reply to `body`. options: what it is generated with.

    begun: None for a reply that is all text; else it is in ReAct's form, and this is what the prompt has of it. A
    stream of the latter is held back until the end, since only then it is known what is said and what is a call.
    """

    def __init__(self, body: ResponsesRequest, options: SamplingOptions, begun: str | None):
        self._begun = begun
        self._number = 0  # of events
        self._message_id = _new_id("msg")
        self._text = ""
        self._output: list[Json] = []  # items that are complete
        self._status = "in_progress"
        choice = body.tool_choice
        self._head: Json = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": options.temperature,
            "top_p": options.top_p,
            "text": {"format": _shown(body.text and body.text.format) or {"type": "text"}},
            "tools": [_tool(_shown(tool)) for tool in body.tools or ()],
            "tool_choice": choice if isinstance(choice, str) else _shown(choice) or "auto",
            "parallel_tool_calls": False,
            "truncation": "disabled",
            "top_logprobs": 0,
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def opening(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response())
        if self._begun is None:
            yield from self._open(_message(self._message_id, None, "in_progress"))

    def grown(self, piece: Piece) -> Iterator[bytes]:
        self._text += piece.text
        if self._begun is None and piece.text:
            yield self._of_text("response.output_text.delta", delta=piece.text, logprobs=[])
        if piece.finish_reason is not None:
            for item in self._items(piece.finish_reason):
                if self._begun is not None:
                    yield from self._open(item)
                    yield from self._fill(item)
                yield from self._close(item)

    def ending(self, usage: Json) -> Iterator[bytes]:
        yield self._event(f"response.{self._status}", response=self._response(usage))

    def failed(self, error: APIError) -> Iterator[bytes]:
        """The second event is for clients that wait for an error: the official one raises on what it holds."""
        told = error.body["error"]
        self._status = "failed"
        reason = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=self._response() | {"error": reason})
        flat = {name: told[name] for name in ("code", "message", "param")}
        yield self._event("error", **flat, error=told)

    def whole(self, replies: Sequence[Piece], usage: Json) -> Json:
        (piece,) = replies
        assert piece.finish_reason is not None
        self._text = piece.text
        self._output = self._items(piece.finish_reason)
        return self._response(usage)

    def _response(self, usage: Json | None = None) -> Json:
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            **self._head,
            "status": self._status,
            "error": None,
            "incomplete_details": incomplete,
            "output": self._output,
            "usage": usage and _usage(usage),
        }

    def _items(self, finish_reason: str) -> list[Json]:
        """What the whole text holds: a message, a call, or both. The last one is incomplete where its length cut it."""
        self._status = "incomplete" if finish_reason == "length" else "completed"
        if self._begun is None:
            return [_message(self._message_id, self._text, self._status)]
        said, call = react.parsed(self._text, self._begun)
        if call is None:
            return [_message(self._message_id, said, self._status)]
        called = {
            "id": _new_id("fc"),
            "type": "function_call",
            "status": self._status,
            "call_id": react.new_id(),
            "name": call.name,
            "arguments": call.arguments,
        }
        return [_message(self._message_id, said, "completed"), called] if said else [called]

    # Events of an item, which is the next of the output.

    def _open(self, item: Json) -> Iterator[bytes]:
        empty: Json = {"content": []} if item["type"] == "message" else {"arguments": ""}
        added = item | empty | {"status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self._output), item=added)
        if item["type"] == "message":
            yield self._of_text("response.content_part.added", part=_part(""))

    def _fill(self, item: Json) -> Iterator[bytes]:
        if item["type"] == "message":
            yield self._of_text("response.output_text.delta", delta=item["content"][0]["text"], logprobs=[])
        else:
            yield self._of_call("response.function_call_arguments.delta", item, delta=item["arguments"])

    def _close(self, item: Json) -> Iterator[bytes]:
        if item["type"] == "message":
            (part,) = item["content"]
            yield self._of_text("response.output_text.done", text=part["text"], logprobs=[])
            yield self._of_text("response.content_part.done", part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_call("response.function_call_arguments.done", item, **told)
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _of_text(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._message_id, "output_index": len(self._output), "content_index": 0}
        return self._event(kind, **place, **fields)

    def _of_call(self, kind: str, item: Json, **fields: Any) -> bytes:
        return self._event(kind, item_id=item["id"], output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + content + b"\n\n"


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _message(identity: str, text: str | None, status: str) -> Json:
    content = [] if text is None else [_part(text)]
    return {"id": identity, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _shown(asked: Any) -> Json | None:
    """A part of the request as it came."""
    return None if asked is None else asked.model_dump(by_alias=True, exclude_unset=True)


def _tool(tool: Json | None) -> Json:
    """With the fields that the client's own type must have. Arguments follow the schema only where a call is forced."""
    return {"parameters": None, "strict": False} | (tool or {})


def _usage(usage: Json) -> Json:
    """Of chat's numbers those of this API. Writing into the cache is free here, and a reply has no hidden reasoning."""
    details = usage["prompt_tokens_details"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": details | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
