"""A real HTTP server that answers chat completions by a rule, as a judge does."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REFUSED = "refuse this one"  # a prompt with these words gets status 400


class JudgeServer:
    """Use it as a context. says: prompt -> the reply. asked: the bodies of all requests so far, in their order."""

    def __init__(self, says: Callable[[str], str], name: str = "judge"):
        self.says, self.name, self.asked = says, name, list[dict]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Tests read what commands print."""

            def do_GET(self) -> None:
                model = {"id": judge.name, "object": "model", "created": 0, "owned_by": "tests"}
                self._answer(200, {"object": "list", "data": [model]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                judge.asked.append(body)
                text = prompt(body)
                if REFUSED in text:
                    self._answer(400, {"error": {"message": "no", "type": "invalid_request_error"}})
                    return
                choice = {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": judge.says(text)},
                }
                head = {"id": "x", "object": "chat.completion", "created": 0, "model": judge.name}
                usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
                self._answer(200, head | {"choices": [choice], "usage": usage})

            def _answer(self, status: int, value: dict) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler


def prompt(body: dict) -> str:
    """The text of a request, which has nothing but text."""
    (message,) = body["messages"]
    (part,) = message["content"]
    return part["text"]
