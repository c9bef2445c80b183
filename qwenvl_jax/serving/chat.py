"""POST /v1/chat/completions: OpenAI's form of a conversation and its reply."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from qwenvl_jax.config import UserError
from qwenvl_jax.inference import requests
from qwenvl_jax.inference.grammar import GrammarConstraint, check_numbers
from qwenvl_jax.serving import prompts, react
from qwenvl_jax.serving.answer import Job, Piece, answer
from qwenvl_jax.serving.chunks import ChoiceForm, Choices
from qwenvl_jax.serving.errors import APIError
from qwenvl_jax.serving.logprobs import TokenTexts, chat_logprobs
from qwenvl_jax.serving.messages import NamedTool
from qwenvl_jax.serving.openapi import described
from qwenvl_jax.serving.prompts import Prepared
from qwenvl_jax.serving.react import Tool
from qwenvl_jax.serving.reply_schema import ChatCompletion
from qwenvl_jax.serving.schema import ChatRequest, JsonObject, JsonSchema, Regex
from qwenvl_jax.serving.state import Server
from qwenvl_jax.serving.tool_form import ToolForm

router = APIRouter()


@router.post("/v1/chat/completions", **described(ChatRequest, ChatCompletion, streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answers a conversation, in one piece or as a stream."""
    return await answer(request, ChatRequest, prepare)


async def prepare(body: ChatRequest, server: Server) -> Job:
    """What the engine is asked for a conversation, and how its replies are written."""
    prepared, made, acts = await asked(body, server)
    form: ChoiceForm = ChatForm(body.model, server.token_texts, bool(body.logprobs))
    if acts:
        form = ToolForm(form, prepared.begun, older=not body.tools and bool(body.functions))
    return Job([prepared], made, Choices(form, len(made), body.include_usage), bool(body.stream))


async def asked(body: ChatRequest, server: Server) -> tuple[Prepared, list[requests.Request], bool]:
    """The prompt of a conversation, a request for each reply, and whether replies are in ReAct's form.

    Raises APIError.
    """
    vlm = server.vlm
    if not vlm.is_chat:
        raise APIError(
            400, "unsupported_model", "model: a base model, which does not chat; use /v1/completions", "model"
        )
    tools, forced = offered(body)
    prepared = await prompts.from_messages(body.messages, server, tools)
    constraint = await server.with_prompts(_constraint, body, forced, prepared.begun, server)
    # What is constrained ends where its form does, which needs the token that says so.
    stop_ids = () if body.ignore_eos and constraint is None else tuple(vlm.chat_stop_ids)
    acts = bool(tools or prepared.begun)
    made = [
        requests.Request(
            prepared.prompt,
            options.replace({"stop": (*options.stop, react.STOP)}) if acts else options,
            stop_ids=stop_ids,
            strip=True,
            alternatives=(body.top_logprobs or 0) if body.logprobs else None,
            picture_keys=prepared.picture_keys,
            constraint=constraint and constraint.copy(),
            adapter=server.adapter(body.model),
        )
        for options in prompts.options(body, prepared, server)
    ]
    return prepared, made, acts


def offered(body: ChatRequest) -> tuple[list[Tool], list[Tool]]:
    """The tools that the model is told of, and those of which it must call one. Raises APIError."""
    field, choice = ("tool_choice", body.tool_choice) if not body.functions else ("function_call", body.function_call)
    functions = [tool.function for tool in body.tools or ()] or body.functions or []
    tools = [
        Tool(
            function.name_for_model or function.name,
            function.description_for_model or function.description,
            function.parameters or {"type": "object", "properties": {}},
            function.name_for_human,
        )
        for function in functions
    ]
    if choice is None or choice == "auto":
        return tools, []
    if choice == "none":
        return [], []
    if not tools:
        raise APIError(400, "invalid_value", f"{field}: only with tools", field)
    if choice == "required":
        return tools, tools
    name = choice.function.name if isinstance(choice, NamedTool) else choice.name
    forced = [tool for tool in tools if tool.name == name]
    if not forced:
        raise APIError(400, "invalid_value", f"{field}: there is no tool {name!r}", field)
    return tools, forced


def _constraint(body: ChatRequest, forced: list[Tool], begun: str, server: Server) -> GrammarConstraint | None:
    """What the replies must look like, where the request says. Raises APIError for what cannot be followed."""
    field = "tools" if forced else "response_format"
    try:
        if forced:
            for tool in forced:
                check_numbers(tool.parameters)
            return server.grammars.lark(react.grammar(forced, begun))
        match body.response_format:
            case JsonObject():
                return server.grammars.json_object()
            case JsonSchema(json_schema=wanted):
                return server.grammars.json_schema(wanted.body)
            case Regex(regex=pattern):
                return server.grammars.regex(pattern)
    except UserError as error:
        raise APIError(400, "invalid_value", f"{field}: {error}", field) from None
    return None


class ChatForm:
    """How a reply of chat completions is written."""

    def __init__(self, model: str, texts: TokenTexts, logprobs: bool):
        self.head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts = texts
        self._logprobs = logprobs

    def name(self, stream: bool) -> str:
        return "chat.completion.chunk" if stream else "chat.completion"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs_of(piece) if piece.choices else None,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs_of(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs_of(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(self._texts, piece.texts, piece.choices) if self._logprobs else None
