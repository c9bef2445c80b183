"""JSON replies, by orjson: several times as fast as the standard library, and never a NaN in them."""

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Response


class JSONReply(Response):
    """A reply with a JSON body."""

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(orjson.dumps(content), status, dict(headers or {}), "application/json")
