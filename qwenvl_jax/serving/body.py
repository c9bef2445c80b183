"""A request's body: read within its time, parsed, and checked against a schema."""

import asyncio
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from qwenvl_jax.serving.errors import APIError, from_validation
from qwenvl_jax.serving.state import Server
from qwenvl_jax.serving.stream import Disconnected

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, schema: type[Body], server: Server) -> Body:
    """The body as a `schema`. Raises APIError naming the field that is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also because a browser sends any other type across sites without asking.
        raise APIError(415, "unsupported_media_type", "send JSON, with the header `Content-Type: application/json`")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(415, "unsupported_media_type", "send the body as it is, without a Content-Encoding")
    try:
        async with asyncio.timeout(server.settings.body_timeout):
            raw = await request.body()
    except TimeoutError:
        raise APIError(408, "timeout", f"the body did not arrive in {server.settings.body_timeout:g} s") from None
    except ClientDisconnect:
        raise Disconnected from None
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise APIError(400, "invalid_json", f"the body is not valid JSON: {error}") from None
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise from_validation(error, content) from None


def check_model(name: str, server: Server) -> None:
    """Raises APIError for the name of a model that is not served here."""
    known = server.settings.names
    if name not in known:
        message = f"model: there is no {name[:100]!r} here; this server has {', '.join(known)}"
        raise APIError(404, "model_not_found", message, "model")
