"""POST /v1/responses: OpenAI's Responses API without its memory, as another way to write a request for chat.

A request becomes one for chat completions, and from there on nothing differs but the form of what is sent. So what chat
refuses is refused here, under the names that the fields have here.
"""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from qwenvl_jax.serving import chat
from qwenvl_jax.serving.answer import Job, answer
from qwenvl_jax.serving.errors import APIError, from_validation
from qwenvl_jax.serving.openapi import described
from qwenvl_jax.serving.reply_schema import ResponseObject
from qwenvl_jax.serving.responses_form import ResponseForm
from qwenvl_jax.serving.responses_schema import (
    CallItem,
    InputImage,
    InputText,
    MessageItem,
    OutputText,
    Refusal,
    ResponsesRequest,
    ResultItem,
)
from qwenvl_jax.serving.schema import Asked, ChatRequest
from qwenvl_jax.serving.state import Server

router = APIRouter()
Json = dict[str, Any]


@router.post("/v1/responses", **described(ResponsesRequest, ResponseObject, streams=True))
async def create_response(request: Request) -> Response:
    """Answers a conversation, in one piece or as a stream of typed events. Nothing of it is kept."""
    return await answer(request, ResponsesRequest, prepare)


async def prepare(body: ResponsesRequest, server: Server) -> Job:
    """What the engine is asked for a conversation, and how its reply is written."""
    messages, items = _messages(body)
    try:
        translated = _as_chat(body, messages)
        translated.check_together()
        prepared, (made,), acts = await chat.asked(translated, server)
    except APIError as error:
        raise _renamed(error, items) from error.__cause__
    form = ResponseForm(body, made.options, prepared.begun if acts else None)
    return Job([prepared], [made], form, bool(body.stream))


def _as_chat(body: ResponsesRequest, messages: list[Json]) -> ChatRequest:
    fields = {name: getattr(body, name) for name in Asked.model_fields}
    fields |= {"messages": messages, "max_completion_tokens": body.max_output_tokens}
    if body.tools:
        tools = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in body.tools]
        fields["tools"] = [{"type": "function", "function": tool} for tool in tools]
    choice = body.tool_choice
    named = {"type": "function", "function": {"name": getattr(choice, "name", None)}}
    fields["tool_choice"] = choice if choice is None or isinstance(choice, str) else named
    if body.text is not None and body.text.format is not None:
        form = body.text.format.model_dump(by_alias=True)
        fields["response_format"] = {"type": form["type"], "json_schema": form} | form
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, fields) from None


def _messages(body: ResponsesRequest) -> tuple[list[Json], list[str]]:
    """The conversation as messages for chat, and for each where it stands in `body`."""
    messages: list[Json] = []
    places: list[str] = []
    for number, item in enumerate(body.input):
        latest: Json = messages[-1] if messages else {"role": None}
        match item:
            case MessageItem():
                message: Json = {"role": item.role, "content": [_part(part) for part in item.content]}
            case CallItem():
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                if latest["role"] == "assistant":  # a thought, or another call at the same time
                    latest.setdefault("tool_calls", []).append(call)
                    continue
                message = {"role": "assistant", "tool_calls": [call]}
            case ResultItem():
                message = {"role": "tool", "content": [_part(part) for part in item.output]}
                message["tool_call_id"] = item.call_id
        messages.append(message)
        places.append(f"input.{number}")
    if body.instructions is not None:
        text = {"type": "text", "text": body.instructions}
        if messages[0]["role"] in ("system", "developer"):  # chat has one system message
            messages[0]["content"][:0] = [text, {"type": "text", "text": "\n\n"}]
        else:
            messages.insert(0, {"role": "system", "content": [text]})
            places.insert(0, "instructions")
    return messages, places


def _part(part: Any) -> Json:
    match part:
        case InputText() | OutputText():
            return {"type": "text", "text": part.text}
        case Refusal():
            return {"type": "text", "text": part.refusal}
        case InputImage():
            return {"type": "image_url", "image_url": {"url": part.image_url}}
        case extension:
            return extension.model_dump(exclude_unset=True)


_MESSAGE = re.compile(r"^messages[.\[](\d+)\]?(?:\.content[.\[](\d+)\]?)?((?:\.image_url(?=\.url))?)(?:\.url)?")
_FIELDS = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


def _renamed(error: APIError, places: Sequence[str]) -> APIError:
    """An error of chat under the names of this API. places: of chat's messages in the request."""

    def place(found: re.Match) -> str:
        part = "" if found[2] is None else f".content.{found[2]}"
        return places[int(found[1])] + part + found[3]

    def renamed(text: str) -> str:
        """Text that may begin with a field's name."""
        text = _MESSAGE.sub(place, text)
        return re.sub(rf"^({'|'.join(_FIELDS)})\b", lambda found: _FIELDS[found[1]], text)

    message = re.sub("; lower max_tokens$", "; lower max_output_tokens", renamed(error.message))
    param = error.param and renamed(error.param)
    return APIError(error.status, error.code, message, param, headers=error.headers)
