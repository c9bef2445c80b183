"""Tools over HTTP, with the official client: a forced call has the form of its schema, whatever the model would say."""

import json

import jsonschema
import pytest
from serving.process import chat, check_error, user

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTIONS = [
    {"name": "weather", "description": "Weather.", "parameters": PARAMETERS},
    {"name": "clock", "description": "Time."},
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
QUESTION = user("Cold?")  # short, since the letters of the tiny vocabulary fill the tiny context soon
NAMED = {"type": "function", "function": {"name": "weather"}}


def ask(openai, **more):
    return openai.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS, seed=1, **more)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call(openai, choice):
    (reply,) = ask(openai, tool_choice=choice).choices
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.message.tool_calls
    assert call.function.name in (("weather",) if choice == NAMED else ("weather", "clock"))
    schema = PARAMETERS if call.function.name == "weather" else {"type": "object"}
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_forced_call_as_a_stream(openai):
    chunks = [chunk.choices[0] for chunk in ask(openai, tool_choice=NAMED, stream=True)]
    assert chunks[0].delta.role == "assistant"
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather")]
    jsonschema.validate(json.loads(calls[0].function.arguments), PARAMETERS)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_a_conversation_goes_on_with_the_result(openai, post):
    (reply,) = ask(openai, tool_choice=NAMED).choices
    result = {"role": "tool", "tool_call_id": reply.message.tool_calls[0].id, "content": "3 degrees"}
    messages = [*QUESTION, reply.message.model_dump(exclude_none=True), result]
    answer = openai.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=9)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    without = post(chat(messages=messages)).json()  # the tools are not needed to read what was said
    assert answer.usage.prompt_tokens > without["usage"]["prompt_tokens"] > 64


def test_tools_change_the_prompt_unless_none_may_be_called(post):
    counts = [
        post(chat(messages=QUESTION, **more)).json()["usage"]["prompt_tokens"]
        for more in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []})
    ]
    assert counts[0] == counts[2] == counts[3] < counts[1]


def test_the_older_form(post):
    body = chat(messages=QUESTION, functions=FUNCTIONS, function_call={"name": "weather"}, max_tokens=None)
    (choice,) = post(body).json()["choices"]
    assert choice["finish_reason"] == "function_call"
    called = choice["message"]["function_call"]
    jsonschema.validate(json.loads(called["arguments"]), PARAMETERS)
    messages = [*QUESTION, choice["message"], {"role": "function", "name": "weather", "content": "3 degrees"}]
    assert post(chat(messages=messages, functions=FUNCTIONS)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "search"}]}, "tools.0.type"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "functions": FUNCTIONS}, "functions"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [*QUESTION, {"role": "tool", "tool_call_id": "x", "content": "3"}]}, "messages.1"),
        ({"messages": [*QUESTION, {"role": "tool", "content": "3"}]}, "messages.1.tool_call_id"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": None}]}, "messages.1.content"),
    ],
)
def test_mistakes(post, fields, param):
    check_error(post(chat(**fields)), 400, param=param)


@pytest.mark.parametrize(("schema", "problem"), [({"if": {}}, "Unimplemented keys"), ({"const": -(2**63)}, "below")])
def test_a_schema_that_cannot_be_followed(post, schema, problem):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    message = check_error(post(chat(tools=tools, tool_choice="required")), 400, "invalid_value", "tools")
    assert problem in message
