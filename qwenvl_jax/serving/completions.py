"""POST /v1/completions: texts or tokens and how they go on, for base models and for prompts of one's own making."""

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from qwenvl_jax.inference import requests
from qwenvl_jax.serving import prompts
from qwenvl_jax.serving.answer import Job, Piece, answer
from qwenvl_jax.serving.chunks import Choices
from qwenvl_jax.serving.logprobs import TokenTexts, completion_logprobs
from qwenvl_jax.serving.openapi import described
from qwenvl_jax.serving.prompts import Prepared
from qwenvl_jax.serving.reply_schema import Completion
from qwenvl_jax.serving.schema import CompletionRequest
from qwenvl_jax.serving.state import Server

router = APIRouter()


@router.post("/v1/completions", **described(CompletionRequest, Completion, streams=True))
async def create_completion(request: Request) -> Response:
    """Continues prompts, in one piece or as a stream."""
    return await answer(request, CompletionRequest, prepare)


async def prepare(body: CompletionRequest, server: Server) -> Job:
    """What the engine is asked for these prompts."""
    prepared = await server.with_prompts(_prompts, body, server)
    stop_ids = () if body.ignore_eos else tuple(server.vlm.raw_stop_ids)
    made = [
        requests.Request(one.prompt, options, stop_ids, alternatives=body.logprobs, adapter=server.adapter(body.model))
        for one in prepared
        for options in prompts.options(body, one, server)
    ]
    form = CompletionForm(body.model, server.token_texts, body.logprobs is not None)
    return Job(prepared, made, Choices(form, len(made), body.include_usage), bool(body.stream))


def _prompts(body: CompletionRequest, server: Server) -> list[Prepared]:
    several = len(body.prompt) > 1
    return [
        prompts.from_text(prompt, server, f"prompt.{number}" if several else "prompt")
        for number, prompt in enumerate(body.prompt)
    ]


class CompletionForm:
    """How a continuation is written."""

    def __init__(self, model: str, texts: TokenTexts, logprobs: bool):
        self.head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts = texts
        self._logprobs = logprobs

    def name(self, stream: bool) -> str:
        return "text_completion"

    def opening(self, index: int) -> None:
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = completion_logprobs(self._texts, piece.texts, piece.choices, piece.offset)
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    whole = chunk
