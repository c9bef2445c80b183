"""/v1/responses: a request of another form for the same reply as chat's, with the official client and without."""

import json
from typing import Literal

import jsonschema
import pytest
from openai import APIError, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel
from serving.process import chat, check_error, picture, user
from serving.simple_engine import BREAKS
from serving.test_tools import PARAMETERS

PATH = "/v1/responses"
QUESTION = "Where is the yellow cross?"
TOOLS = [{"type": "function", "name": "weather", "description": "Weather.", "parameters": PARAMETERS}]
NAMED = {"type": "function", "name": "weather"}
START = ["response.created", "response.in_progress"]
MESSAGE = ["response.output_item.added", "response.content_part.added"]
MESSAGE_DONE = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
DELTA = "response.output_text.delta"


def asked(**changes) -> dict:
    return {"model": "tiny", "input": QUESTION, "max_output_tokens": 8, "temperature": 0} | changes


def shown(**more) -> dict:
    """A picture as this API has it."""
    return {"type": "input_image", "image_url": picture()["image_url"]["url"], **more}


def text(words: str) -> dict:
    return {"type": "input_text", "text": words}


def events_of(response) -> list[dict]:
    """The events of a stream, whose names are those of their content."""
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        if block != ": ping":
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list) -> list[str]:
    """Types of events; several deltas count once."""
    names = [event["type"] if isinstance(event, dict) else event.type for event in events]
    return [name for number, name in enumerate(names) if name != DELTA or names[number - 1] != DELTA]


def test_it_is_what_the_official_client_declares(post):
    reply = post(asked(instructions="Be short.", metadata={"a": "b"}), PATH).json()
    jsonschema.validate(reply, Response.model_json_schema())
    response = Response.model_validate(reply, strict=True)
    assert response.metadata == {"a": "b"}
    assert response.instructions == "Be short."
    assert (response.temperature, response.max_output_tokens, response.status) == (0, 8, "incomplete")
    assert reply["store"] is False


def test_the_official_client_asks_and_goes_on(openai):
    question = [{"role": "user", "content": [shown(), text(QUESTION)]}]
    first = openai.responses.create(**asked(input=question, max_output_tokens=100))
    assert first.output_text
    assert (first.status, first.incomplete_details) == ("completed", None)
    history = [*question, *first.output, {"role": "user", "content": "And the red one?"}]
    second = openai.responses.create(**asked(input=history))
    assert second.output_text
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert second._request_id


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"input": QUESTION}, user(QUESTION)),
        ({"input": [{"role": "user", "content": QUESTION}]}, user(QUESTION)),
        ({"input": [{"type": "message", "role": "user", "content": [text("a"), text("b")]}]}, user("ab")),
        (
            {"input": [{"role": "user", "content": [shown(detail="high"), text("?")]}]},
            user([picture(), {"type": "text", "text": "?"}]),
        ),
        ({"instructions": "Be short."}, [{"role": "system", "content": "Be short."}, *user(QUESTION)]),
        (
            {"instructions": "A", "input": [{"role": "developer", "content": "B"}, {"role": "user", "content": "C"}]},
            [{"role": "system", "content": "A\n\nB"}, *user("C")],
        ),
        (
            {
                "input": [
                    {"role": "user", "content": [shown(), text("a")]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
                    {"role": "user", "content": [{"type": "ref", "ref": "cross"}]},
                    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                    {"role": "user", "content": "d"},
                ]
            },
            [
                *user([picture(), {"type": "text", "text": "a"}]),
                {"role": "assistant", "content": "b"},
                *user([{"type": "ref", "ref": "cross"}]),
                {"role": "assistant", "content": "no"},
                *user("d"),
            ],
        ),
    ],
    ids=["string", "message", "parts", "picture", "instructions", "both", "turns"],
)
def test_the_reply_is_that_of_chat(post, given, messages):
    response = post(asked(**given), PATH).json()
    same = post(chat(messages=messages)).json()
    assert response["output"][0]["content"][0]["text"] == same["choices"][0]["message"]["content"]
    usage = response["usage"]
    assert usage["input_tokens"] == same["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == same["usage"]["completion_tokens"]
    assert usage["total_tokens"] == same["usage"]["total_tokens"]
    details = same["usage"]["prompt_tokens_details"]
    assert usage["input_tokens_details"]["image_tokens"] == details["image_tokens"] == 64 * str(messages).count("data:")


def test_sampling_is_that_of_chat(post):
    drawn = {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 50, "stop": ["7"]}
    response = post(asked(**drawn, max_output_tokens=40), PATH).json()
    same = post(chat(**drawn, max_tokens=40)).json()
    assert response["output"][0]["content"][0]["text"] == same["choices"][0]["message"]["content"]
    assert (response["temperature"], response["top_p"]) == (1.5, 0.9)


@pytest.mark.parametrize("most", [8, 100])
def test_the_events_of_a_stream(post, most):
    whole = post(asked(max_output_tokens=most), PATH).json()
    events = events_of(post(asked(max_output_tokens=most, stream=True), PATH))
    end = f"response.{whole['status']}"
    assert kinds(events) == [*START, *MESSAGE, DELTA, *MESSAGE_DONE, end]
    said = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in events if event["type"] == DELTA) == said
    assert {event["item_id"] for event in events if "item_id" in event} == {events[-1]["response"]["output"][0]["id"]}
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert first["id"] == last["id"]

    def without_names(response: dict) -> dict:
        details = response["usage"]["input_tokens_details"] | {"cached_tokens": None}
        output = [item | {"id": None} for item in response["output"]]
        usage = response["usage"] | {"input_tokens_details": details}
        return response | {"id": None, "created_at": None, "usage": usage, "output": output}

    assert without_names(last) == without_names(whole)
    assert last["incomplete_details"] == ({"reason": "max_output_tokens"} if most == 8 else None)


def test_the_official_client_types_every_event(openai):
    events = list(openai.responses.create(**asked(stream=True)))
    assert kinds(events) == [*START, *MESSAGE, DELTA, *MESSAGE_DONE, "response.incomplete"]
    for event in events:
        type(event).model_validate(event.to_dict(), strict=True)
        assert type(event).model_fields["type"].annotation == Literal[event.type]
    with openai.responses.stream(model="tiny", input=QUESTION, max_output_tokens=100) as stream:
        assert stream.get_final_response().output_text


class Seen(BaseModel):
    colour: Literal["red", "blue"]
    many: bool


def test_the_client_parses_a_schema_into_its_own_class(openai):
    reply = openai.responses.parse(**asked(text_format=Seen, max_output_tokens=200))
    assert isinstance(reply.output_parsed, Seen)
    assert reply.text.format.type == "json_schema"


@pytest.mark.parametrize(
    "form",
    [{"type": "json_object"}, {"type": "regex", "regex": "[0-9]{3}"}, {"type": "text"}],
    ids=lambda form: form["type"],
)
def test_forms(post, form):
    response = post(asked(text={"format": form, "verbosity": "low"}, max_output_tokens=200), PATH).json()
    said = response["output"][0]["content"][0]["text"]
    assert response["text"] == {"format": form}
    if form["type"] != "text":
        assert isinstance(json.loads(said.lstrip("0") or "0"), dict if form["type"] == "json_object" else int)


def test_a_call_and_its_result(openai):
    reply = openai.responses.create(**asked(input="Cold?", tools=TOOLS, tool_choice=NAMED, max_output_tokens=300))
    *said, call = reply.output
    assert [item.type for item in said] in ([], ["message"])
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    assert reply.tools[0].name == reply.tool_choice.name == "weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"}
    history = [{"role": "user", "content": "Cold?"}, *reply.output, result]
    after = openai.responses.create(**asked(input=history, tools=TOOLS))
    assert after.output
    assert after.usage.input_tokens > reply.usage.input_tokens


def test_a_thought_and_its_call_are_one_turn_of_the_assistant(post):
    """As items that follow one another, and as the message of chat that has both."""
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Oslo"}'}
    other = call | {"call_id": "b", "arguments": "{}"}
    results = [{"type": "function_call_output", "call_id": name, "output": "3"} for name in "ab"]
    items = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Hm."}, call, other, *results]
    calls = [
        {"id": each["call_id"], "type": "function", "function": {"name": "weather", "arguments": each["arguments"]}}
        for each in (call, other)
    ]
    messages = [*user("?"), {"role": "assistant", "content": "Hm.", "tool_calls": calls}]
    messages += [{"role": "tool", "tool_call_id": name, "content": "3"} for name in "ab"]
    usage = post(asked(input=items), PATH).json()["usage"]
    assert usage["input_tokens"] == post(chat(messages=messages)).json()["usage"]["prompt_tokens"]


def test_a_call_as_a_stream(openai):
    fields = asked(input="Cold?", tools=TOOLS, tool_choice="required", max_output_tokens=300)
    events = list(openai.responses.create(**fields, stream=True))
    call = ["response.output_item.added", "response.function_call_arguments.delta"]
    call += ["response.function_call_arguments.done", "response.output_item.done"]
    message = [*MESSAGE, DELTA, *MESSAGE_DONE]
    assert kinds(events) in ([*START, *message, *call, "response.completed"], [*START, *call, "response.completed"])
    last = events[-1].response.output[-1]
    jsonschema.validate(json.loads(last.arguments), PARAMETERS)
    assert [event.arguments for event in events if event.type == call[2]] == [last.arguments]
    assert events[-2].item == last
    assert events[-2].output_index == len(events[-1].response.output) - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("prompt", {"id": "pmpt_1"}),
    ],
)
def test_what_would_have_to_be_kept(post, field, value):
    assert "keeps nothing" in check_error(post(asked(**{field: value}), PATH), 400, "unsupported_parameter", field)


@pytest.mark.parametrize(
    "extra",
    [
        {"store": False, "background": False, "previous_response_id": None, "truncation": "disabled"},
        {"user": "u", "service_tier": "auto", "reasoning": {"effort": "low"}, "parallel_tool_calls": True},
        {"include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "top_logprobs": 0, "unheard_of": 1},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_changes_nothing(post, extra):
    assert post(asked(**extra), PATH).json()["parallel_tool_calls"] is False


HELLO = {"role": "user", "content": "a"}
BAD = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "input.0.role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [text("a"), {"type": "input_audio"}]}]}, "input.0.content.1.type"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input.0.content.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input.0.content.0.file_id",
        ),
        ({"input": [{"role": "user", "content": [text("a"), BAD]}]}, "input.0.content.1.image_url"),
        (
            {"input": [HELLO, {"role": "assistant", "content": [shown()]}, HELLO]},
            "input.1.content.0",
        ),
        ({"input": [{"role": "system", "content": [shown()]}, {"role": "user", "content": "a"}]}, "input.0.content.0"),
        ({"instructions": "a", "input": [{"role": "user", "content": "a"}] * 2}, "input.1.role"),
        ({"instructions": "a", "input": [{"role": "user", "content": [BAD]}]}, "input.0.content.0.image_url"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "3"}]}, "input.0"),
        ({"input": "word " * 3000, "max_output_tokens": None}, "input"),
        ({"max_output_tokens": 1020}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 8}, "max_tokens"),
        ({"messages": user("a"), "input": None}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"if": {}}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "tools": TOOLS}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"temperature": 3}, "temperature"),
        ({"model": "gpt-5"}, "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_named_as_this_api_names_things(post, fields, param, stream):
    message = check_error(post(asked(stream=stream, **fields), PATH), 404 if "model" in fields else 400, param=param)
    assert not message.startswith("messages")
    assert "max_tokens" not in message or "max_tokens" in fields


def test_advice_names_fields_of_this_api(post):
    message = check_error(post(asked(max_output_tokens=1020), PATH), 400, "context_length_exceeded")
    assert message.endswith("lower max_output_tokens")


def test_a_fault(small):
    fault = asked(seed=BREAKS, ignore_eos=True)
    check_error(small.client.post(PATH, json=fault), 500, "server_error")
    *_, failed, error = events_of(small.client.post(PATH, json=fault | {"stream": True}))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["code"] == error["code"] == "server_error"
    assert "secret" not in json.dumps([failed, error])
    client = OpenAI(base_url=small.url + "/v1", api_key="none", max_retries=0)
    stream = client.responses.create(**asked(extra_body={"seed": BREAKS, "ignore_eos": True}), stream=True)
    seen = []
    with pytest.raises(APIError) as raised:
        seen.extend(stream)
    assert raised.value.code == "server_error"
    assert seen[-1].type == "response.failed"
