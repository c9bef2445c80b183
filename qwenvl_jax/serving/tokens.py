"""POST /tokenize and /detokenize: what a prompt costs, and what tokens say. In vLLM's form."""

import contextlib

from fastapi import APIRouter, Request, Response

from qwenvl_jax.serving import prompts
from qwenvl_jax.serving.body import check_model, read
from qwenvl_jax.serving.encoding import JSONReply
from qwenvl_jax.serving.openapi import described
from qwenvl_jax.serving.reply_schema import Detokenized, Tokenized
from qwenvl_jax.serving.schema import DetokenizeRequest, TokenizeRequest
from qwenvl_jax.serving.state import Server
from qwenvl_jax.serving.stream import Disconnected

router = APIRouter()


@router.post("/tokenize", **described(TokenizeRequest, Tokenized))
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a conversation with its template and pictures."""
    server: Server = request.app.state.server
    with server.place(), contextlib.suppress(Disconnected):
        body = await read(request, TokenizeRequest, server)
        check_model(body.model, server)
        body.check_together()
        if body.messages is not None:
            prepared = await prompts.from_messages(body.messages, server)
        else:
            prepared = await server.with_prompts(prompts.from_text, body.prompt, server, "prompt")
        tokens = prepared.prompt.input_ids.tolist()
        return JSONReply(
            {
                "count": len(tokens),
                "image_tokens": prepared.image_tokens,
                "max_model_len": server.engine.max_length,
                "tokens": tokens,
            }
        )
    return Response(status_code=499)


@router.post("/detokenize", **described(DetokenizeRequest, Detokenized))
async def detokenize(request: Request) -> Response:
    """The text of tokens, special ones by their names."""
    server: Server = request.app.state.server
    with server.place(), contextlib.suppress(Disconnected):
        body = await read(request, DetokenizeRequest, server)
        check_model(body.model, server)
        return JSONReply({"prompt": await server.with_prompts(server.token_texts.decode, body.tokens)})
    return Response(status_code=499)
