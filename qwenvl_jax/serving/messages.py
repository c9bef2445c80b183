"""The messages of a conversation as clients send them, and the tools that they offer, in OpenAI's form.

Strict types, unknown keys ignored. What becomes of tools is in `react.py`, of pictures in `media.py`.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, core_schema

MOST_PARTS = 4096  # of a list in a request: a longer one would keep the event loop busy
MOST_TOOLS = 128
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """What every form of a request has in common."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


@dataclasses.dataclass(frozen=True)
class Refused:
    """Of a field that this server does not have: only values that ask for nothing pass."""

    allowed: tuple[Any, ...]
    advice: str = "leave it out"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.allowed)}

    def _check(self, value: Any) -> Any:
        if not any(value == other and type(value) is type(other) for other in self.allowed):
            raise PydanticCustomError(
                "unsupported", "is not supported by this server: {advice}", {"advice": self.advice}
            )
        return value


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _image_url_hint(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError("string_instead_of_object_type", 'must be an object, {"url": "..."}, not a string')
    return value


class ImageURL(Strict):
    """detail: taken and without effect, since the model sees every picture at one size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_image_url_hint)]


class RefPart(Strict):
    """An extension: a label whose box is asked for."""

    type: Literal["ref"]
    ref: str


class BoxPart(Strict):
    """An extension: left, top, right, bottom in pixels of the picture of that number, counted from 0, or the latest."""

    type: Literal["box"]
    box: Annotated[list[Number], Field(min_length=4, max_length=4)]
    label: str | None = None
    image: Annotated[int, Field(ge=0)] | None = None


class QuadPart(Strict):
    """An extension: the four corners of something slanted, as x1, y1 to x4, y4."""

    type: Literal["quad"]
    quad: Annotated[list[Number], Field(min_length=8, max_length=8)]
    label: str | None = None
    image: Annotated[int, Field(ge=0)] | None = None


Part = Annotated[TextPart | ImagePart | RefPart | BoxPart | QuadPart, Field(discriminator="type")]


def _text_as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string or a list of parts")
    return value


Content = Annotated[
    list[Part],
    Field(min_length=1, max_length=MOST_PARTS, fail_fast=True),
    BeforeValidator(_text_as_parts, json_schema_input_type=str | Annotated[list[Part], Field(min_length=1)]),
]


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Strict):
    """What the model may ask for. The last three are the original server's own names."""

    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    name_for_model: Name | None = None
    name_for_human: str | None = None
    description_for_model: str | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)]
Functions = Annotated[list[Function], Field(max_length=MOST_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
FunctionChoice = Literal["none", "auto"] | NamedFunction


class FunctionCall(Strict):
    """arguments: what the model wrote, which need not be JSON."""

    name: Annotated[str, Field(max_length=256)]
    arguments: str


class ToolCall(Strict):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class UserMessage(Strict):
    """developer: OpenAI's newer name of system."""

    role: Literal["system", "developer", "user"]
    content: Content


class AssistantMessage(Strict):
    """content may be null beside calls."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    function_call: FunctionCall | None = None
    content: Content | None = Field(default=None, validate_default=True)

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and not (info.data.get("tool_calls") or info.data.get("function_call")):
            raise PydanticCustomError("content_type", "must be a string or a list of parts, but beside calls")
        return content


class ToolMessage(Strict):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


class FunctionMessage(Strict):
    """The older form of a result, of the function that was called last."""

    role: Literal["function"]
    content: Content


Message = Annotated[UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
