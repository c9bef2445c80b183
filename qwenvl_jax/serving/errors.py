"""Every error that a client sees, in OpenAI's form: {"error": {"message", "type", "param", "code"}}.

Messages are bounded, so that no request, however large, gets a large answer; what an exception says that was not meant
for clients goes to the log alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from qwenvl_jax.config import UserError
from qwenvl_jax.serving.encoding import JSONReply

LONGEST_MESSAGE = 500  # characters
LONGEST_PARAM = 120

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}  # of errors that the router raises
_WRONG_TYPE = re.compile(r"_type$|^missing_type|dict_attributes_type")
_PLACE = re.compile(r"^messages((?:\[\d+\]|\.[a-z_]+)+)")


class APIError(Exception):
    """An error to be sent to the client.

    code: a word for programs. param: the dotted path of the field that is wrong. retry_after: seconds after which it is
    worth another try; None leaves the choice to the client. retry: False tells it not to try again.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        *,
        retry_after: float | None = None,
        retry: bool = True,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = shortened(message, LONGEST_MESSAGE)
        self.param = None if param is None else shortened(param, LONGEST_PARAM)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(math.ceil(retry_after))
        if not retry:
            self.headers["x-should-retry"] = "false"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the reply, also that of an error event in a stream."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The reply to a request that failed before anything was sent."""
        return JSONReply(self.body, self.status, self.headers)


def shortened(text: str, most: int) -> str:
    """`text`, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def internal_error() -> APIError:
    """What a client is told of an exception that nobody expected."""
    return APIError(500, "server_error", "the server failed on this request; its log names the reason by request id")


def from_user_error(error: UserError) -> APIError:
    """A mistake in messages or options, whose text names `messages[0].content[1]` or the option first."""
    text = str(error)
    place = _PLACE.match(text)
    param = place and place[0].replace("[", ".").replace("]", "")
    return APIError(400, "invalid_value", text, param or None)


def from_validation(error: ValidationError, body: Any) -> APIError:
    """The first mistake that a schema found in a body, and how many more there are."""
    details = error.errors(include_url=False, include_input=False)
    first = details[0]
    param = dotted(first["loc"], body, first["type"])
    text = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "missing":
            code, text = "missing_required_parameter", "is required"
        case "unsupported":
            code = "unsupported_parameter"
        case "union_tag_invalid" | "union_tag_not_found":
            code, param = "invalid_value", f"{param}.{first['ctx']['discriminator'].strip(chr(39))}"
            text = (
                f"must be one of {first['ctx']['expected_tags']}" if "expected_tags" in first["ctx"] else "is missing"
            )
        case kind:
            code = "invalid_type" if _WRONG_TYPE.search(kind) else "invalid_value"
            text = text.replace("Input should", "should").replace(" after validation", "")
            text = re.sub("a valid dictionary or .*", "an object", text)
    more = f" (and {len(details) - 1} more mistakes)" if len(details) > 1 else ""
    return APIError(400, code, f"{param or 'the body'}: {text}{more}", param)


def dotted(location: Sequence[str | int], body: Any, kind: str) -> str | None:
    """The path of a mistake in the body itself: pydantic's locations also name the branches of unions."""
    path: list[str] = []
    place = body
    for number, step in enumerate(location):
        inside = isinstance(place, dict) and step in place
        inside = inside or (isinstance(place, list) and isinstance(step, int) and step < len(place))
        if inside:
            place = place[step]
        elif not (kind == "missing" and number == len(location) - 1):
            continue
        path.append(str(step))
    return ".".join(path) or None


def install(app: FastAPI) -> None:
    """Lets `app` answer errors in this form. What else is raised is for the outermost middleware."""

    @app.exception_handler(APIError)
    async def on_api_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code)
        message = f"{request.method} {shortened(request.url.path, 100)}: {error.detail}"
        return APIError(error.status_code, code, message, headers=error.headers).response()
