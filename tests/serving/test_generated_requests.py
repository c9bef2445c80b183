"""Requests that nobody thought of: right ones with parts of them changed, left out or exchanged.

The server answers or says in OpenAI's form what is wrong, in few words, and never with a 5xx. The requests are the same
in every run.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from serving.process import chat, check_error, picture, user
from serving.test_tools import NAMED, TOOLS

TURNS = [
    {"role": "system", "content": "Be short."},
    *user([picture(), {"type": "text", "text": "Where?"}]),
    {"role": "assistant", "content": "There."},
    *user([{"type": "text", "text": "And "}, {"type": "ref", "ref": "it"}, {"type": "box", "box": [1, 2, 30, 20]}]),
]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
CHATS = [
    chat(max_tokens=2),
    chat(max_tokens=2, messages=TURNS),
    chat(max_tokens=2, n=2, temperature=1.5, seed=1, top_p=0.9, top_k=5, min_p=0.1, logit_bias={"7": 1.5}),
    chat(max_tokens=2, logprobs=True, top_logprobs=2, stop=["a", "b"], stop_token_ids=[3], min_tokens=1),
    chat(max_tokens=2, stream=True, stream_options={"include_usage": True}, presence_penalty=0.5),
    chat(max_tokens=2, response_format=FORM, frequency_penalty=-0.5, repetition_penalty=1.1),
    chat(max_tokens=2, messages=user("Cold?"), tools=TOOLS, tool_choice=NAMED),
    chat(
        max_tokens=2,
        messages=[
            *user("?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        ],
    ),
]
FLAT = {"type": "function", "name": "weather", "description": "Weather.", "parameters": SCHEMA}
CALLED = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"}
ANSWERED = {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "3"}]}
SHOWN = {"type": "input_image", "image_url": picture()["image_url"]["url"], "detail": "auto"}
SAID = {"role": "assistant", "content": [{"type": "output_text", "text": "There.", "annotations": []}]}
ASKED = {"type": "message", "role": "user", "content": [SHOWN, {"type": "input_text", "text": "Where?"}]}
BRIEF: dict[str, Any] = {"model": "tiny", "input": "Where?", "max_output_tokens": 2, "temperature": 0}
RESPONSES = [
    BRIEF | {"metadata": {"a": "b"}, "instructions": "Be short.", "store": False, "include": []},
    BRIEF | {"input": [ASKED, SAID, {"role": "user", "content": "And now?"}], "top_p": 0.5, "seed": 1},
    BRIEF | {"input": [{"role": "user", "content": "?"}, CALLED, ANSWERED], "tools": [FLAT], "tool_choice": "auto"},
    BRIEF | {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "stream": True},
]

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, -(2**63), 2**64, 10**400, 1e308, -0.0, 0.5, float("nan"), float("inf")])
    | st.text(max_size=8)
    | st.sampled_from(["", "tiny", "auto", "text", "user", "data:image/png;base64,", "\x00", "<img>", "x" * 5000])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where something stands in JSON: what holds it, and its key or number there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@st.composite
def changed(draw: st.DrawFn, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """One of the bodies, with one change or two."""
    body = copy.deepcopy(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(body))
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        match draw(st.sampled_from(["other", "other", "none", "twice", "within", "elsewhere", "more"])):
            case "other":
                holder[key] = draw(VALUES)
            case "none":
                del holder[key]
            case "twice":
                holder[key] = [holder[key], holder[key]]
            case "within":
                holder[key] = {str(key): holder[key]}
            case "elsewhere":
                there, other = found[draw(st.integers(0, len(found) - 1))]
                holder[key] = copy.deepcopy(there[other])
            case "more" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(VALUES)
            case "more":
                holder.insert(key, draw(VALUES))
    return body


def check(response: httpx.Response, form: jsonschema.protocols.Validator) -> None:
    """An answer or an error, each in its form."""
    assert response.status_code in (200, 400, 404), response.text[:500]
    if response.status_code != 200:
        check_error(response, response.status_code)
    elif response.headers["content-type"] == "application/json":
        form.validate(response.json())
    else:
        last = response.text.removesuffix("data: [DONE]\n\n").removesuffix("\n\n").rpartition("data: ")[2]
        assert json.loads(last).get("error") is None


SAME_IN_EVERY_RUN = settings(
    max_examples=120, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
JSON = {"content-type": "application/json"}
CHAT_FORM, RESPONSE_FORM = (
    jsonschema.Draft202012Validator(kind.model_json_schema()) for kind in (ChatCompletion, Response)
)


@SAME_IN_EVERY_RUN
@given(body=changed(CHATS))
def test_changed_requests_for_chat(client, body):
    response = client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    check(response, CHAT_FORM)


@SAME_IN_EVERY_RUN
@given(body=changed(RESPONSES))
def test_changed_requests_for_responses(client, body):
    response = client.post("/v1/responses", content=json.dumps(body), headers=JSON)
    check(response, RESPONSE_FORM)


@pytest.mark.parametrize(("path", "bodies"), [("/v1/chat/completions", CHATS), ("/v1/responses", RESPONSES)])
def test_unchanged_they_are_right(post, path, bodies):
    assert [post(body, path).status_code for body in bodies] == [200] * len(bodies)
