"""/openapi.json: the routes read their bodies themselves, so what they take is described here."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qwenvl_jax.serving.reply_schema import Error
from qwenvl_jax.serving.responses_schema import ResponsesRequest
from qwenvl_jax.serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
_REFERENCE = "#/components/schemas/{model}"
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_ERRORS = {400, 401, 404, 405, 408, 413, 415, 429, 500, 503, 504}
_ERRORS_WITHOUT_BODY = {401, 404, 405, 500, 503}


def described(body: type[BaseModel] | None, reply: type[BaseModel], streams: bool = False) -> dict[str, Any]:
    """Arguments of a route that takes `body` and sends `reply`, or with `streams` also server-sent events."""
    statuses = _ERRORS_WITHOUT_BODY if body is None else _ERRORS
    responses: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in sorted(statuses)}
    responses[200] = {"model": reply}
    if reply.__name__ == "Status":
        responses[503] = {"model": reply}
    if streams:
        responses[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    described: dict[str, Any] = {"responses": responses, "response_model": None}
    if body is not None:
        schema = {"$ref": _REFERENCE.format(model=body.__name__)}
        content = {"application/json": {"schema": schema}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return described


def install(app: FastAPI, version: str, model_names: Sequence[str]) -> None:
    """Lets /openapi.json name the bodies, too, and what `model` may be in them."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=version, routes=app.routes)
            _, definitions = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REFERENCE)
            made["components"]["schemas"] |= definitions["$defs"]
            for body in _BODIES:
                made["components"]["schemas"][body.__name__]["properties"]["model"]["enum"] = list(model_names)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
