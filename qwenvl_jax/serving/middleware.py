"""What happens to every request before a route sees it: a request id, a log line, keys, and a limit on the body.

Plain ASGI, so that streams pass through untouched and a client that goes away is noticed at once.
"""

import dataclasses
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenvl_jax.serving.errors import APIError, internal_error
from qwenvl_jax.serving.metrics import Metrics
from qwenvl_jax.serving.settings import MEGABYTE

OPEN_PATHS = ("/health", "/ready")  # for probes, which have no keys
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("qwenvl.requests")


@dataclasses.dataclass
class Record:
    """What the log says of a request. Nothing in it is a user's text."""

    request_id: str
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 499  # until something is sent: the client went away
    stream: bool = False
    images: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # code of an error after the start of a stream
    first_token_seconds: float | None = None


def record_of(scope: Scope) -> Record:
    """The record of a request that passed `Observed`."""
    return scope["state"]["record"]


class Observed:
    """The outermost: gives the request an id, counts and logs it, and answers what nobody expected with a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unexpected error", extra={"fields": {"request_id": record.request_id}})
            if not started:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._note(scope, record)

    def _note(self, scope: Scope, record: Record) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # never the path itself, which anyone may write
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http.labels(route, method, str(record.status)).inc()
        fields: dict[str, Any] = {"method": method, "route": route}
        fields |= {name: value for name, value in vars(record).items() if value or name == "status"}
        fields["seconds"] = round(time.monotonic() - fields.pop("arrived"), 4)
        quiet = route in (*OPEN_PATHS, "/metrics") and record.status == 200
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Keys:
    """Lets in requests with one of the API keys, and those for the paths of probes."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path as the router sees it, compared whole: no spelling of another path is one of these.
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            error = APIError(
                401,
                "invalid_api_key",
                "missing or wrong API key; send it as `Authorization: Bearer KEY`",
                headers={"www-authenticate": "Bearer"},
            )
            return await error.response()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not given[0].startswith(b"Bearer "):
            return False
        # Every key is compared, so that the time tells nothing.
        return sum(hmac.compare_digest(given[0][7:], key) for key in self._keys) > 0


class BodyLimit:
    """Refuses bodies above a size: by what they announce, and while they come."""

    def __init__(self, app: ASGIApp, most: int):
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._most:
            return await self._error().response()(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._error()
            return message

        return await self._app(scope, counted, send)

    def _error(self) -> APIError:
        return APIError(
            413,
            "request_too_large",
            f"the body is larger than {self._most / MEGABYTE:g} MiB, this server's limit; send smaller pictures",
            headers={"connection": "close"},
        )
