"""Replies of a given form, as clients ask for them: whatever the model would say, the form is there."""

import json
import re

import pytest
from pydantic import BaseModel, Field
from serving.process import chat, check_error, picture, user


class Shape(BaseModel):
    kind: str = Field(pattern="^(circle|cross|square)$")
    filled: bool


class Scene(BaseModel):
    shapes: list[Shape] = Field(min_length=1, max_length=2)


def form(**fields) -> dict:
    return {"response_format": fields}


QUESTION = user([picture(), {"type": "text", "text": "What do you see?"}])


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_the_client_parses_a_schema_into_its_own_class(openai, temperature):
    reply = openai.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Scene, temperature=temperature, seed=3, max_tokens=200
    )
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.parsed.shapes


def test_a_json_object(post):
    answer = post(chat(messages=QUESTION, max_tokens=200, **form(type="json_object"))).json()
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)


def test_a_pattern_streamed_for_several_replies(openai):
    texts = ["", ""]
    body = chat(messages=QUESTION, n=2, temperature=1, seed=1, **form(type="regex", regex="[0-9]{3}-(ja|nein)"))
    body["extra_body"] = {"response_format": body.pop("response_format")}
    for chunk in openai.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(re.fullmatch("[0-9]{3}-(ja|nein)", text) for text in texts), texts


def test_it_ends_where_its_form_does_even_without_a_stop_token(post):
    body = chat(messages=QUESTION, max_tokens=50, ignore_eos=True, min_tokens=20, **form(type="regex", regex="yes|no"))
    choice = post(body).json()["choices"][0]
    assert choice["message"]["content"] in ("yes", "no")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"if": {}}}}, "Unimplemented keys"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://10.0.0.1/"}}}, "not fetch"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [{"a": -(2**63)}]}}}, "below"),
        ({"type": "regex", "regex": "(?=a)"}, "look-around"),
        ({"type": "regex", "regex": "a" * 70_000}, "longer than"),
    ],
)
def test_a_form_that_cannot_be_followed(post, wanted, message):
    assert message in check_error(post(chat(response_format=wanted)), 400, "invalid_value", "response_format")


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}, "response_format.json_schema.schema"),
        ({"type": "regex", "regex": ""}, "response_format.regex"),
    ],
)
def test_a_form_that_is_none(post, wanted, param):
    check_error(post(chat(response_format=wanted)), 400, param=param)
