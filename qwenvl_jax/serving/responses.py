"""What this server sends, for /openapi.json. The replies themselves are made where they are sent."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class _Response(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(_Response):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Response):
    error: ErrorDetail


class Model(_Response):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(_Response):
    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(_Response):
    image_tokens: int
    text_tokens: int
    cached_tokens: int


class Usage(_Response):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Response):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Response):
    content: list[TokenLogprob] | None
    refusal: Any


class CalledFunction(_Response):
    name: str
    arguments: str


class Call(_Response):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(_Response):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[Call] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(_Response):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Response):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(_Response):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Response):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Response):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Tokenized(_Response):
    count: int
    image_tokens: int
    max_model_len: int
    tokens: list[int]


class Detokenized(_Response):
    prompt: str


class Status(_Response):
    status: Literal["loading", "ready", "draining", "stuck", "dead"]


class Version(_Response):
    version: str
