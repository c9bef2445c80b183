"""What a question adds to a conversation to make a request: settings of the page, and the request as code."""

import contextlib
import dataclasses
import json
import math
import pprint
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_jax.demo.client import AskError
from qwenvl_jax.demo.pictures import Picture

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
NUMBERS = ("temperature", "top_p", "top_k", *PENALTIES, "max_tokens", "seed")
DETAILS = ("auto", "low", "high")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the visitor wrote, all of it text. What is empty is left to the server and the model."""

    temperature: str = ""
    top_p: str = ""
    top_k: str = ""
    repetition_penalty: str = ""
    presence_penalty: str = ""
    frequency_penalty: str = ""
    max_tokens: str = ""
    seed: str = ""
    system: str = ""
    detail: str = "auto"
    schema: str = ""


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


def request(model: str, messages: Sequence[dict], settings: Settings) -> dict[str, Any]:
    """The body of a request for a streamed reply. Raises AskError for what is no number or no schema."""
    body: dict[str, Any] = {"model": model, "messages": list(messages)}
    for name in NUMBERS:
        if text := getattr(settings, name).strip():
            body[name] = _number(name, text)
    if settings.schema.strip():
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": _schema(settings.schema)},
        }
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def _number(name: str, text: str) -> int | float:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise AskError("number", name, name=name, value=text)


def _schema(text: str) -> dict:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise AskError("schema", "response_format", reason=str(error)) from None
    if not isinstance(schema, dict):
        raise AskError("schema", "response_format", reason="{...}")
    return schema


def as_curl(body: Mapping[str, Any], pictures: Sequence[Picture], base_url: str, with_key: bool) -> str:
    """The request for a shell with curl and base64, to be run where the picture files are.

    It goes through standard input: a picture is longer than an argument may be.
    """
    text = json.dumps(_named(body, pictures), ensure_ascii=False, indent=1)
    text = re.sub(r"[\\$`]", r"\\\g<0>", text)  # what a here-document would read as its own
    for number, picture in enumerate(pictures):
        file = f"$(base64 < {_quoted(picture.name)} | tr -d '\\n')"
        text = text.replace(f"<<picture {number}>>", f"data:{_kind(body, number)};base64,{file}")
    key = ' \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"' if with_key else ""
    head = f"curl -sN {base_url}/chat/completions{key} \\\n  -H 'Content-Type: application/json' -d @- <<END"
    return f"{head}\n{text}\nEND\n"


def as_python(body: Mapping[str, Any], pictures: Sequence[Picture], base_url: str, with_key: bool) -> str:
    """The request with the official client, to be run where the picture files are."""
    known = {name: value for name, value in _named(body, pictures).items() if name not in ("stream", "stream_options")}
    beyond = {name: known.pop(name) for name in ("top_k", "repetition_penalty") if name in known}
    lines = [f"    {name}={_literal(value)}," for name, value in known.items()]
    if beyond:
        lines.append(f"    extra_body={_literal(beyond)},")
    text = "\n".join(lines)
    for number, picture in enumerate(pictures):
        text = text.replace(repr(f"<<picture {number}>>"), f"picture({picture.name!r}, {_kind(body, number)!r})")
    head = ["from openai import OpenAI", ""]
    if pictures:
        head = ["import base64", *head]
        head += [
            "",
            "def picture(name, kind):",
            '    with open(name, "rb") as file:',
            '        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"',
            "",
            "",
        ]
    key = "" if with_key else ', api_key="none"'  # else from $OPENAI_API_KEY
    return "\n".join(
        [
            *head,
            f"client = OpenAI(base_url={base_url!r}{key})",
            "stream = client.chat.completions.create(",
            text,
            "    stream=True,",
            ")",
            "for chunk in stream:",
            '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
            "",
        ]
    )


def _named(body: Mapping[str, Any], pictures: Sequence[Picture]) -> dict[str, Any]:
    """The body with `<<picture N>>` in place of the N-th picture's data."""
    numbers = iter(range(len(pictures)))

    def part(part: dict) -> dict:
        if part.get("type") != "image_url":
            return part
        return {**part, "image_url": {**part["image_url"], "url": f"<<picture {next(numbers)}>>"}}

    def message(message: dict) -> dict:
        content = message["content"]
        return message if isinstance(content, str) else {**message, "content": [part(piece) for piece in content]}

    return {**body, "messages": [message(each) for each in body["messages"]]}


def _kind(body: Mapping[str, Any], number: int) -> str:
    """The media type of the N-th picture's data URI."""
    urls = [
        part["image_url"]["url"]
        for message in body["messages"]
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    return urls[number].removeprefix("data:").partition(";")[0]


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "'\\''") + "'"


def _literal(value: Any) -> str:
    """Python for `value`, over several lines where it is long."""
    return pprint.pformat(value, width=100, sort_dicts=False).replace("\n", "\n    ")
