"""GET /v1/models: the names under which the one model is served, and those of its adapters."""

from fastapi import APIRouter, Request, Response

from qwenvl_jax.serving.body import check_model
from qwenvl_jax.serving.encoding import JSONReply
from qwenvl_jax.serving.openapi import described
from qwenvl_jax.serving.reply_schema import Model, ModelList
from qwenvl_jax.serving.state import Server

router = APIRouter()

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@router.get("/v1/models", **described(None, ModelList))
async def list_models(request: Request) -> Response:
    """All names."""
    server: Server = request.app.state.server
    return JSONReply({"object": "list", "data": [_model(name, server) for name in server.settings.names]})


@router.get("/v1/models/{name:path}", **described(None, Model))
async def retrieve_model(name: str, request: Request) -> Response:
    """One name; it may hold slashes."""
    server: Server = request.app.state.server
    check_model(name, server)
    return JSONReply(_model(name, server))


def _model(name: str, server: Server) -> dict:
    base = server.settings.model_names[0]
    return {
        "id": name,
        "object": "model",
        "created": server.started,
        "owned_by": "qwenvl-jax",
        "root": base,
        "parent": base if name in server.settings.adapters else None,
        "max_model_len": server.max_length,
        "generation_config": _defaults(server),
    }


def _defaults(server: Server) -> dict | None:
    """What a request that says nothing gets, under the names of a request's fields; None while loading."""
    if not server.loaded:
        return None
    defaults = server.vlm.defaults
    return {name: getattr(defaults, name) for name in DEFAULTS}
