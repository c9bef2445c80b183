import json
import subprocess

import pytest

from qwenvl_jax.demo.asking import Settings, as_curl, as_python, request
from qwenvl_jax.demo.client import AskError
from qwenvl_jax.demo.pictures import Picture

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"}}


def test_what_is_empty_is_not_sent():
    body = request("tiny", [], Settings())
    assert body == {"model": "tiny", "messages": [], "stream": True, "stream_options": {"include_usage": True}}


def test_settings_become_fields_of_the_request():
    settings = Settings(temperature=" 0.5 ", top_k="40", seed="7", max_tokens="16", schema='{"type": "string"}')
    body = request("tiny", [], settings)
    assert (body["temperature"], body["top_k"], body["seed"], body["max_tokens"]) == (0.5, 40, 7, 16)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "string"}


@pytest.mark.parametrize(
    ("settings", "kind", "param"),
    [
        (Settings(temperature="hot"), "number", "temperature"),
        (Settings(top_p="nan"), "number", "top_p"),
        (Settings(seed="1e999"), "number", "seed"),
        (Settings(schema="{"), "schema", "response_format"),
        (Settings(schema="[1]"), "schema", "response_format"),
    ],
)
def test_a_mistake_names_its_setting(settings, kind, param):
    with pytest.raises(AskError) as error:
        request("tiny", [], settings)
    assert (error.value.kind, error.value.param) == (kind, param)


@pytest.mark.parametrize(
    "text", ["$(touch stolen)", "`touch stolen`", "back\\slash \"quote\" 'single'", "END", "图\nEND\n"]
)
def test_text_in_the_shell_is_only_text(text, tmp_path):
    """A model's words are in the history that a visitor is invited to paste into a shell."""
    content = [PICTURE, {"type": "text", "text": text}]
    body = request("tiny", [{"role": "user", "content": content}], Settings(system=text))
    (tmp_path / "it's.png").write_bytes(b"\0\0\0")
    command = as_curl(body, [Picture("/x", "it's.png", 1, 1)], "http://127.0.0.1:1/v1", with_key=True)
    (tmp_path / "curl").write_text('#!/bin/sh\ncat > sent\necho "$@" > told\n')
    (tmp_path / "curl").chmod(0o755)
    subprocess.run(["bash", "-c", f"PATH=$PWD:$PATH; {command}"], cwd=tmp_path, check=True, timeout=20)
    assert not (tmp_path / "stolen").exists()
    assert json.loads((tmp_path / "sent").read_text()) == body  # three zero bytes are AAAA
    assert "http://127.0.0.1:1/v1/chat/completions" in (tmp_path / "told").read_text()


def test_the_python_code_asks_for_the_same():
    content = [PICTURE, {"type": "text", "text": "图 'x' \"y\"\n"}]
    body = request("tiny", [{"role": "user", "content": content}], Settings(top_k="5", temperature="0"))
    code = as_python(body, [Picture("/x", "a.png", 1, 1)], "http://127.0.0.1:1/v1", with_key=False)
    asked: dict = {}

    class Completions:
        def create(self, **fields):
            asked.update(fields)
            return []

    class OpenAI:
        def __init__(self, base_url, api_key):
            self.chat = type("Chat", (), {"completions": Completions()})
            assert (base_url, api_key) == ("http://127.0.0.1:1/v1", "none")

    compiled = compile(code.replace("from openai import OpenAI", ""), "ask.py", "exec")
    code_globals = {"OpenAI": OpenAI, "open": lambda *_: open("/dev/null", "rb")}  # noqa: SIM115 - the code closes it
    exec(compiled, code_globals)
    asked |= asked.pop("extra_body")
    assert asked.pop("messages")[0]["content"][1] == content[1]
    assert asked == {"model": "tiny", "temperature": 0, "top_k": 5, "stream": True}
