"""What requests may hold: the fields of OpenAI's API that this server honours, and some that vLLM has besides.

Types are strict: a JSON number is not taken from a string or a bool. Keys that are not listed are ignored, since
clients send many that mean nothing here (`user`, `store`, `metadata`, ...). Fields that would change the answer and
that this server does not have are `Refused`. What needs the model (lengths, ids, pictures) is checked in `prompts.py`.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, core_schema

from qwenvl_jax.serving.errors import APIError

MOST_PARTS = 4096  # of a list in a request: a longer one would keep the event loop busy
MOST_TOKENS = 2**17  # of a prompt that is given as token ids
MOST_REPLIES = 128  # n
MOST_STOPS = 4
MOST_LOGPROBS = 20  # of other tokens, with each token
LONGEST_STOP = 256  # characters; the search for stop strings costs time for every token
MOST_BIASES = 300


class _Strict(BaseModel):
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


Tools = Annotated[Any, Refused((None, []), "leave it out and describe the tools in the prompt")]
ToolChoice = Annotated[Any, Refused((None, "none", "auto"))]
Modalities = Annotated[Any, Refused((None, ["text"]), "only text is generated")]
Nothing = Annotated[Any, Refused((None,))]
Off = Annotated[Any, Refused((None, False))]
On = Annotated[Any, Refused((None, True))]
One = Annotated[Any, Refused((None, 1), "use n")]


def _one_string_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stop = Annotated[
    list[StopString],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_one_string_as_list, json_schema_input_type=StopString | list[StopString]),
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]  # keys of JSON objects are strings
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Probability = Annotated[Number, Field(ge=0, le=1)]


class AnyText(_Strict):
    type: Literal["text"]


class JsonObject(_Strict):
    type: Literal["json_object"]


class NamedSchema(_Strict):
    """strict: taken and without effect, since the reply follows the schema in any case."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchema(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Regex(_Strict):
    """An extension: the whole reply matches."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1)]


ResponseFormat = Annotated[AnyText | JsonObject | JsonSchema | Regex, Field(discriminator="type")]


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Off = None


class Sampling(_Strict):
    """What chat and completions have in common. A field that is absent or null takes the model's own default."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check_together(self) -> None:
        """Raises APIError where fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "invalid_value", "stream_options: only with stream: true", "stream_options")

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the reply may have, where the client says."""
        return self.max_tokens

    @property
    def replies(self) -> int:
        """How many replies each prompt gets."""
        return self.n or 1

    @property
    def requests(self) -> int:
        """How many replies there are in all."""
        return self.replies

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _image_url_hint(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError("string_instead_of_object_type", 'must be an object, {"url": "..."}, not a string')
    return value


class ImageURL(_Strict):
    """detail: taken and without effect, since the model sees every picture at one size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_image_url_hint)]


class RefPart(_Strict):
    """An extension: a label whose box is asked for."""

    type: Literal["ref"]
    ref: str


class BoxPart(_Strict):
    """An extension: left, top, right, bottom in pixels of the picture of that number, counted from 0, or the latest."""

    type: Literal["box"]
    box: Annotated[list[Number], Field(min_length=4, max_length=4)]
    label: str | None = None
    image: Annotated[int, Field(ge=0)] | None = None


class QuadPart(_Strict):
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


class Message(_Strict):
    """developer: OpenAI's newer name of system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    tool_calls: Tools = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]


class ChatRequest(Sampling):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    functions: Tools = None
    function_call: ToolChoice = None
    response_format: ResponseFormat | None = None
    modalities: Modalities = None
    audio: Nothing = None
    web_search_options: Nothing = None
    continue_final_message: Off = None
    add_generation_prompt: On = None

    def check_together(self) -> None:
        super().check_together()
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "invalid_value", "top_logprobs: only with logprobs: true", "top_logprobs")

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]


def _prompts(value: Any) -> Any:
    """One prompt, a string or token ids, as the list of prompts that it is."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and not isinstance(value[0], str | list):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "must be a string, token ids, or a list of these")
    return value


AnyPrompt = str | TokenIds
Prompts = Annotated[
    list[AnyPrompt],
    Field(min_length=1, max_length=MOST_REPLIES, fail_fast=True),
    BeforeValidator(_prompts, json_schema_input_type=AnyPrompt | Annotated[list[AnyPrompt], Field(min_length=1)]),
]


class CompletionRequest(Sampling):
    """prompt: ordinary text, in which nothing counts as a special token, or token ids."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Off = None
    suffix: Nothing = None
    best_of: One = None

    @property
    def requests(self) -> int:
        return self.replies * len(self.prompt)


class TokenizeRequest(_Strict):
    """One of prompt and messages."""

    model: str
    prompt: str | None = None
    messages: Messages | None = None

    def check_together(self) -> None:
        """Raises APIError unless there is one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise APIError(400, "invalid_value", "prompt: give one of prompt and messages", "prompt")


class DetokenizeRequest(_Strict):
    model: str
    tokens: Annotated[list[TokenId], Field(max_length=MOST_TOKENS, fail_fast=True)]
