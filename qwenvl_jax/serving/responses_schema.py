"""What a request to /v1/responses may hold: the fields of OpenAI's Responses API that a server without memory honours.

Strict types, unknown keys ignored, as in `schema.py`. What asks the server to keep something, or to fetch what it kept,
is refused by name, since nothing is kept. How a request becomes one for chat is in `responses.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from qwenvl_jax.serving.messages import MOST_PARTS, MOST_TOOLS, BoxPart, Name, QuadPart, RefPart, Refused, Strict
from qwenvl_jax.serving.schema import AnyText, Asked, JsonObject, NamedSchema, Nothing, Regex, Tokens

LOGPROBS = "message.output_text.logprobs"

_KEPT = "it keeps nothing between requests; "
Kept = Annotated[Any, Refused((None,), _KEPT + "send the whole conversation as input")]
NotStored = Annotated[Any, Refused((None, False), _KEPT + "leave it out, or say false")]
Foreground = Annotated[Any, Refused((None, False), _KEPT + "wait for the answer, or stream it")]
Untruncated = Annotated[Any, Refused((None, "disabled"), "nothing is left out silently; shorten the input")]
NoLogprobs = Annotated[Any, Refused((None, 0), "use /v1/chat/completions for log-probabilities")]
ChatLength = Annotated[Any, Refused((None,), "use max_output_tokens")]
ChatForm = Annotated[Any, Refused((None,), "use text.format")]
OneReply = Annotated[Any, Refused((None, 1), "ask again")]


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class InputImage(Strict):
    """detail: taken and without effect, since the model sees every picture at one size."""

    type: Literal["input_image"]
    file_id: Kept = None
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class OutputText(Strict):
    type: Literal["output_text"]
    text: str


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    InputText | InputImage | OutputText | Refusal | RefPart | BoxPart | QuadPart, Field(discriminator="type")
]


def _text_as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


_SIZE = Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)
Parts = Annotated[
    list[Part],
    _SIZE,
    BeforeValidator(_text_as_parts, json_schema_input_type=str | Annotated[list[Part], Field(min_length=1)]),
]
Texts = Annotated[
    list[InputText],
    _SIZE,
    BeforeValidator(_text_as_parts, json_schema_input_type=str | Annotated[list[InputText], Field(min_length=1)]),
]


class MessageItem(Strict):
    """developer: OpenAI's newer name of system. assistant: what was answered before."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Parts


class CallItem(Strict):
    """A call that the model asked for; arguments need not be JSON."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(max_length=256)]
    arguments: str


class ResultItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Texts


def _named(item: Any) -> Any:
    """An item without a type is a message."""
    return {"type": "message"} | item if isinstance(item, dict) and "role" in item else item


Item = Annotated[MessageItem | CallItem | ResultItem, Field(discriminator="type"), BeforeValidator(_named)]


def _one_message(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "must be a string or a list of items")
    return value


Input = Annotated[
    list[Item],
    _SIZE,
    BeforeValidator(_one_message, json_schema_input_type=str | Annotated[list[Item], Field(min_length=1)]),
]


class FormatSchema(NamedSchema):
    type: Literal["json_schema"]


class TextOptions(Strict):
    """format: `regex` is an extension, as in chat."""

    format: Annotated[AnyText | JsonObject | FormatSchema | Regex, Field(discriminator="type")] | None = None


class ResponseTool(Strict):
    """A function that the model may ask for."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ChosenTool(Strict):
    type: Literal["function"]
    name: Name


Label = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class ResponsesRequest(Asked):
    """Fields beyond OpenAI's are those of chat: `top_k`, `seed`, `stop`, ..."""

    input: Input
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    metadata: Annotated[dict[Label, Value], Field(max_length=16)] | None = None
    include: list[str] | None = None
    store: NotStored = None
    previous_response_id: Kept = None
    conversation: Kept = None
    background: Foreground = None
    prompt: Kept = None
    context_management: Nothing = None
    moderation: Nothing = None
    truncation: Untruncated = None
    top_logprobs: NoLogprobs = None
    max_tokens: ChatLength = None
    response_format: ChatForm = None
    n: OneReply = None

    @field_validator("include")
    @classmethod
    def _can_be_included(cls, include: list[str] | None) -> list[str] | None:
        """What else may be named here is of tools and reasoning, of which there is none in a reply."""
        if LOGPROBS in (include or ()):
            raise PydanticCustomError(
                "unsupported", "{name} is not supported by this server: use /v1/chat/completions", {"name": LOGPROBS}
            )
        return include
