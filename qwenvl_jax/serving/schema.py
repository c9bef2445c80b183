"""What requests may hold: the fields of OpenAI's API that this server honours, and some that vLLM has besides.

Types are strict: a JSON number is not taken from a string or a bool. Keys that are not listed are ignored, since
clients send many that mean nothing here (`user`, `store`, `metadata`, ...). Fields that would change the answer and
that this server does not have are `Refused`. What needs the model (lengths, ids, pictures) is checked in `prompts.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from qwenvl_jax.serving.errors import APIError
from qwenvl_jax.serving.messages import (
    FunctionChoice,
    Functions,
    Messages,
    Number,
    Refused,
    Strict,
    ToolChoice,
    Tools,
)

MOST_TOKENS = 2**17  # of a prompt that is given as token ids
MOST_REPLIES = 128  # n
MOST_STOPS = 4
MOST_LOGPROBS = 20  # of other tokens, with each token
LONGEST_STOP = 256  # characters; the search for stop strings costs time for every token
MOST_BIASES = 300


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
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]  # that a reply may have
Probability = Annotated[Number, Field(ge=0, le=1)]


class AnyText(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    """strict: taken and without effect, since the reply follows the schema in any case."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Regex(Strict):
    """An extension: the whole reply matches."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1)]


ResponseFormat = Annotated[AnyText | JsonObject | JsonSchema | Regex, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Off = None


class Asked(Strict):
    """What all requests for replies have in common. A field that is absent or null takes the model's own default."""

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
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None

    @property
    def requests(self) -> int:
        """How many replies there are in all."""
        return 1

    def check_together(self) -> None:
        """Raises APIError where fields contradict each other."""


class Sampling(Asked):
    """What chat and completions have in common."""

    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    max_tokens: Tokens | None = None
    stream_options: StreamOptions | None = None

    def check_together(self) -> None:
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
        return self.replies

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampling):
    messages: Messages
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None
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
        if self.tools and self.functions:
            raise APIError(400, "invalid_value", "functions: the older name of tools; give one of them", "functions")
        formed = self.response_format is not None and self.response_format.type != "text"
        if formed and (self.tools or self.functions):
            raise APIError(400, "unsupported_parameter", "response_format: not with tools", "response_format")

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


class TokenizeRequest(Strict):
    """One of prompt and messages."""

    model: str
    prompt: str | None = None
    messages: Messages | None = None

    def check_together(self) -> None:
        """Raises APIError unless there is one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise APIError(400, "invalid_value", "prompt: give one of prompt and messages", "prompt")


class DetokenizeRequest(Strict):
    model: str
    tokens: Annotated[list[TokenId], Field(max_length=MOST_TOKENS, fail_fast=True)]
