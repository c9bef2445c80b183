"""Servers as processes of their own, what is sent to them, and the form of what they must answer."""

import base64
import io
import json
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from PIL import Image
from processes import REPOSITORY, Process

REAL = REPOSITORY / "serve.py"
SIMPLE = Path(__file__).parent / "simple_engine.py"

ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class ServerProcess(Process):
    """A server on a free port. wait: until it is ready."""

    def __init__(self, *options: str, script: Path = SIMPLE, wait: bool = True, env: dict[str, str] | None = None):
        self._wait = wait
        super().__init__(script, "--port", "0", *options, env=env)

    def started(self) -> None:
        self.url = self.line(r"listening on (http://\S+)")[1]
        self.client = httpx.Client(base_url=self.url, timeout=60)
        if self._wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.line("ready: ")

    def __exit__(self, *failure: object) -> None:
        self.client.close()
        super().__exit__(*failure)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def open(self, body: dict[str, Any]) -> socket.socket:
        """A connection that has sent a request for chat, and whose answer nobody reads."""
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over the series with these labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"qwenvl:{name}(\{{.*\}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def wait_until_idle(self, seconds: float = 5) -> None:
        """Returns when nothing runs and nothing waits."""
        end = time.monotonic() + seconds
        while self.metric("num_requests_running") or self.metric("num_requests_waiting"):
            assert time.monotonic() < end, "the engine still works for somebody"
            time.sleep(0.02)


def chat(**changes: Any) -> dict[str, Any]:
    """A body for chat completions."""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Where is the yellow cross?"}],
        "max_tokens": 8,
        "temperature": 0,
    } | changes


def user(content: Any) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


def picture(colour: str = "red", size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    """A message part with a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return encoded(buffer.getvalue())


def encoded(content: bytes) -> dict[str, Any]:
    """A message part with the bytes of a PNG file."""
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def check_error(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> str:
    """That a reply is an error in OpenAI's form, bounded and with a request id. Returns its message."""
    assert response.status_code == status, response.text[:500]
    jsonschema.validate(response.json(), ERROR)
    assert len(response.content) < 4096
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    return error["message"]
