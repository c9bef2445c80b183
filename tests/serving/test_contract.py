"""The API's contract: what clients of OpenAI's API rely on."""

import jsonschema
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion
from serving.process import chat, check_error, picture, user

PATH = "/v1/chat/completions"


def test_the_list_of_models(client, openai):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "Qwen/Qwen-VL-Chat"]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert model["owned_by"]
    assert [model.id for model in openai.models.list()] == ["tiny", "Qwen/Qwen-VL-Chat"]


@pytest.mark.parametrize("name", ["tiny", "Qwen/Qwen-VL-Chat", "Qwen%2FQwen-VL-Chat"])
def test_a_model_by_its_name(client, name):
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 200
    assert response.json()["id"] == name.replace("%2F", "/")


@pytest.mark.parametrize("name", ["gpt-5", "Qwen", "tiny/", "Qwen/Qwen-VL"])
def test_a_model_that_is_not_there(client, name):
    check_error(client.get(f"/v1/models/{name}"), 404, "model_not_found", "model")


@pytest.mark.parametrize("changes", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["7"]}])
def test_a_reply_is_what_the_official_client_declares(post, changes):
    reply = post(chat(**changes)).json()
    jsonschema.validate(reply, ChatCompletion.model_json_schema())
    ChatCompletion.model_validate(reply, strict=True)
    for choice in reply["choices"]:
        assert {"index", "message", "logprobs", "finish_reason"} <= set(choice)
        assert {"role", "content", "refusal"} <= set(choice["message"])


@pytest.mark.parametrize("changes", [{}, {"n": 2}, {"logprobs": True}, {"stream_options": {"include_usage": True}}])
def test_a_chunk_is_what_the_official_client_declares(openai, changes):
    for chunk in openai.chat.completions.with_raw_response.create(**chat(stream=True, **changes)).parse():
        jsonschema.validate(chunk.to_dict(), ChatCompletionChunk.model_json_schema())


def test_a_completion_is_what_the_official_client_declares(post):
    reply = post({"model": "tiny", "prompt": "Hello", "max_tokens": 4, "logprobs": 2}, "/v1/completions").json()
    jsonschema.validate(reply, Completion.model_json_schema())


def test_the_official_client_chats(openai):
    reply = openai.chat.completions.create(
        **chat(messages=user([picture(), {"type": "text", "text": "What is this?"}]))
    )
    assert reply.choices[0].message.content
    assert reply.usage.prompt_tokens_details.image_tokens == 64
    assert reply._request_id


def test_a_request_id_is_given(client):
    first, second = (client.get("/v1/models").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_a_safe_request_id_is_kept(client):
    for path in ("/v1/models", "/nothing"):
        assert client.get(path, headers={"x-request-id": "Trace-1.a_b"}).headers["x-request-id"] == "Trace-1.a_b"


@pytest.mark.parametrize("given", ["x" * 65, "two words", "semi;colon", "<tag>", "%0d%0aset-cookie:a", ""])
def test_an_unsafe_request_id_is_replaced(client, given):
    kept = client.get("/v1/models", headers={"x-request-id": given}).headers["x-request-id"]
    assert kept
    assert kept != given


@pytest.mark.parametrize(
    "extra",
    [
        {"unheard_of": {"deep": [1]}},
        {"user": "someone", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"parallel_tool_calls": True, "prompt_cache_key": "k", "reasoning_effort": "low"},
        {"verbosity": "low", "safety_identifier": "s"},
        {
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "stop": None,
            "seed": None,
            "n": None,
        },
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_keys_that_mean_nothing_here_are_ignored(post, extra):
    assert post(chat(**extra)).status_code == 200


def test_what_librechat_sends(client):
    body = {
        "model": "tiny",
        "user": "65f0c1",
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stream": True,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
    }
    response = client.post(PATH, json=body)
    assert response.status_code == 200
    assert response.text.endswith("data: [DONE]\n\n")


def test_what_open_webui_sends(client):
    """Every picture of the conversation again in each turn, as data."""
    body = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture()]},
            {"role": "assistant", "content": "A red square."},
            {"role": "user", "content": [{"type": "text", "text": "And this?"}, picture("blue")]},
        ],
        "max_tokens": 4,
    }
    assert client.post(PATH, json=body).status_code == 200


def test_the_model_must_be_named(client, post):
    body = chat()
    del body["model"]
    check_error(post(body), 400, "missing_required_parameter", "model")
    check_error(post(chat(model="gpt-5")), 404, "model_not_found", "model")
    assert post(chat(model="Qwen/Qwen-VL-Chat")).json()["model"] == "Qwen/Qwen-VL-Chat"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages.0"),
        (user(None), "messages.0.content"),
        (user([]), "messages.0.content"),
        (user([{"type": "text"}]), "messages.0.content.0.text"),
        (user([{"type": "text", "text": "a"}, {"type": "video_url"}]), "messages.0.content.1.type"),
        (user([{"text": "a"}]), "messages.0.content.0.type"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "wizard", "content": "a"}], "messages.0.role"),
        ([{"role": "tool", "content": "a"}], "messages.0.tool_call_id"),
        ([{"content": "a"}], "messages.0.role"),
        ([*user("a"), *user("b")], "messages.1.role"),
        ([{"role": "assistant", "content": "a"}], "messages.0.role"),
        ([{"role": "system", "content": [picture()]}, *user("a")], "messages.0.content.0"),
        (
            [*user("a"), {"role": "assistant", "content": "b", "tool_calls": [{}]}, *user("c")],
            "messages.1.tool_calls.0.id",
        ),
    ],
    ids=str,
)
def test_messages_that_are_wrong(post, messages, param):
    check_error(post(chat(messages=messages)), 400, param=param)


def test_a_picture_that_is_a_bare_string(post):
    part = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
    message = check_error(post(chat(messages=user([part]))), 400, "invalid_type", "messages.0.content.0.image_url")
    assert '{"url": "..."}' in message


def test_empty_text_is_text(post):
    assert post(chat(messages=user(""))).status_code == 200


def test_text_in_parts_is_text(post):
    tokens = [
        post({"model": "tiny", "messages": user(content)}, "/tokenize").json()["tokens"]
        for content in ("Where is it?", [{"type": "text", "text": "Where is"}, {"type": "text", "text": " it?"}])
    ]
    assert tokens[0] == tokens[1]


def test_a_developer_is_the_system(post):
    tokens = [
        post({"model": "tiny", "messages": [{"role": role, "content": "Be short."}, *user("Hi")]}, "/tokenize").json()
        for role in ("system", "developer")
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, "8", True])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_number_of_tokens_that_is_wrong(post, field, value):
    check_error(post(chat(**{field: value})), 400, param=field)


def test_the_newer_name_of_max_tokens_wins(post):
    reply = post(chat(max_tokens=8, max_completion_tokens=3, ignore_eos=True)).json()
    assert reply["usage"]["completion_tokens"] == 3


def test_more_tokens_than_fit(post):
    message = check_error(post(chat(max_tokens=1020)), 400, "context_length_exceeded", "max_tokens")
    assert "1024" in message
    assert "1020" in message


def test_a_prompt_that_does_not_fit(post):
    content = [picture(), {"type": "text", "text": "word " * 3000}]
    body = chat(messages=user(content))
    del body["max_tokens"]
    message = check_error(post(body), 400, "context_length_exceeded", "messages")
    count = post({"model": "tiny", "messages": user(content)}, "/tokenize").json()["count"]
    assert f"{count} ({count - 64} of text, 64 of pictures)" in message


def test_old_turns_are_never_left_out(post):
    """The prompt that the processor would shorten is refused as a whole."""
    turns = [*user("word " * 1000), {"role": "assistant", "content": "Yes."}] * 3
    check_error(post(chat(messages=[*turns, *user("And?")])), 400, "context_length_exceeded")


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/chat/completions/", "/", "/v2/models", "/docs", "/health/"])
def test_paths_that_there_are_not(client, path):
    response = client.get(path)
    if path == "/v1/models/":
        check_error(response, 404, "model_not_found")
    else:
        check_error(response, 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("DELETE", "/v1/models", "GET"), ("GET", PATH, "POST"), ("POST", "/health", "GET, HEAD"), ("PUT", PATH, "POST")],
)
def test_methods_that_a_path_has_not(client, method, path, allowed):
    response = client.request(method, path)
    check_error(response, 405, "method_not_allowed")
    assert sorted(response.headers["allow"].split(", ")) == allowed.split(", ")


def test_probes_may_ask_for_the_head(client):
    assert client.head("/health").status_code == 200
    assert client.head("/ready").status_code == 200


def test_preflight_only_where_a_page_may_call(client, guarded):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    check_error(client.options(PATH, headers=asked), 405)
    allowed = guarded.client.options(PATH, headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = guarded.client.options(PATH, headers=asked | {"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", None])
def test_a_body_that_is_not_called_json(client, kind):
    response = client.post(PATH, content=b"{}", headers={} if kind is None else {"content-type": kind})
    check_error(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}),
    ],
)
def test_what_is_not_supported_is_said(post, field, value):
    check_error(post(chat(**{field: value})), 400, "unsupported_parameter", field)
