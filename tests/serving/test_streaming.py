"""Streams: the same answer in pieces, and what happens when something goes wrong in the middle."""

import asyncio
import contextlib
import json
import time

import pytest
from openai import APIError, OpenAI
from serving.process import chat, check_error, user
from serving.simple_engine import BREAKS, PAUSES
from serving.test_pictures import memory

from qwenvl_jax.serving.stream import DONE, PING, EventStream, event


def chunks_of(response) -> list[dict]:
    """The JSON of a stream's events; that it ends as it must."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    events = [event for event in response.text.removesuffix("\n\n").split("\n\n") if event != ": ping"]
    assert events[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in events[:-1]]


def choices_of(chunks: list[dict], index: int = 0) -> list[dict]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def content_of(chunks: list[dict], index: int = 0) -> str:
    return "".join(choice["delta"].get("content", "") for choice in choices_of(chunks, index))


def counts_of(reply: dict) -> list[int]:
    """The numbers of tokens of a reply, without those that a cache had, which come to more the second time."""
    return [reply["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]


@pytest.mark.parametrize(
    "question", ["Where is it?", "黄色的十字在哪里？", "👩‍👩‍👧 🇩🇪", "é ñ", "\u2028\u0085\r\n"], ids=ascii
)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2, "seed": 1, "ignore_eos": True}], ids=["greedy", "hot"])
def test_pieces_joined_are_the_reply(post, question, sampling):
    body = chat(messages=user(question), max_tokens=48) | sampling
    whole = post(body).json()["choices"][0]
    chunks = chunks_of(post(body | {"stream": True}))
    assert content_of(chunks) == whole["message"]["content"]
    assert choices_of(chunks)[-1]["finish_reason"] == whole["finish_reason"]


def test_broken_characters_are_at_the_end_or_the_models(post):
    """No piece ends inside of a character: what is not in the reply is in no piece."""
    body = chat(max_tokens=64, temperature=2, ignore_eos=True)
    for seed in range(3):
        whole = post(body | {"seed": seed}).json()["choices"][0]["message"]["content"]
        pieces = [
            choice["delta"].get("content", "")
            for choice in choices_of(chunks_of(post(body | {"seed": seed, "stream": True})))
        ]
        assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


@pytest.mark.parametrize("n", [1, 3])
def test_the_form_of_a_stream(post, n):
    chunks = chunks_of(post(chat(stream=True, n=n, temperature=1, seed=1)))
    for index in range(n):
        first, *rest = choices_of(chunks, index)
        assert first["delta"]["role"] == "assistant"
        assert first["delta"]["content"] == ""
        assert all("role" not in choice["delta"] for choice in rest)
        reasons = [choice["finish_reason"] for choice in (first, *rest)]
        assert reasons[-1] in ("stop", "length")
        assert not any(reasons[:-1])
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_at_the_end_of_a_stream(post):
    chunks = chunks_of(post(chat(stream=True, stream_options={"include_usage": True})))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert counts_of(chunks[-1]) == counts_of(post(chat()).json())


@pytest.mark.parametrize("options", [{"include_usage": True}, {}])
def test_stream_options_without_a_stream(post, options):
    check_error(post(chat(stream_options=options)), 400, param="stream_options")


def test_usage_with_every_chunk_is_not_offered(post):
    options = {"include_usage": True, "continuous_usage_stats": True}
    param = "stream_options.continuous_usage_stats"
    check_error(post(chat(stream=True, stream_options=options)), 400, "unsupported_parameter", param)


def test_log_probabilities_of_a_stream(post):
    body = chat(logprobs=True, top_logprobs=2, max_tokens=20)
    whole = post(body).json()["choices"][0]["logprobs"]["content"]
    choices = choices_of(chunks_of(post(body | {"stream": True})))
    pieces = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert pieces == whole


def test_a_stream_of_completions(post):
    body = {"model": "tiny", "prompt": ["Hello", "Where"], "max_tokens": 6, "temperature": 0}
    whole = post(body, "/v1/completions").json()
    chunks = chunks_of(post(body | {"stream": True, "stream_options": {"include_usage": True}}, "/v1/completions"))
    for index in range(2):
        choices = choices_of(chunks, index)
        assert "".join(choice["text"] for choice in choices) == whole["choices"][index]["text"]
        assert choices[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
    assert counts_of(chunks[-1]) == counts_of(whole)


def test_the_official_client_reads_a_stream(openai):
    with openai.chat.completions.stream(**chat(max_tokens=200)) as stream:
        assert stream.get_final_completion().choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"messages": []}, 400, "invalid_value"),
        ({"messages": user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])}, 400, None),
        ({"messages": user("word " * 4000), "max_tokens": None}, 400, "context_length_exceeded"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded"),
        ({"model": "gpt-5"}, 404, "model_not_found"),
        ({"tools": [{}]}, 400, "missing_required_parameter"),
        ({"audio": {}}, 400, "unsupported_parameter"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_a_stream_starts(post, changes, status, code):
    check_error(post(chat(stream=True, **changes)), status, code)


def test_a_fault_in_the_middle_of_a_stream(small):
    response = small.client.post("/v1/chat/completions", json=chat(stream=True, seed=BREAKS, ignore_eos=True))
    *chunks, last = chunks_of(response)
    assert content_of(chunks)
    assert not any(choice["finish_reason"] for choice in choices_of(chunks))
    assert last["error"]["type"] == "server_error"
    assert last["error"]["code"] == "server_error"
    assert "secret" not in response.text
    assert "/root" not in response.text
    assert "secret" in small.line(response.headers["x-request-id"]).string


def test_the_official_client_raises_on_a_fault_in_the_middle(small):
    client = OpenAI(base_url=small.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(APIError) as raised:
        for _ in client.chat.completions.create(**chat(stream=True, seed=BREAKS)):
            pass
    assert raised.value.code == "server_error"


def test_a_fault_without_a_stream(small):
    response = small.client.post("/v1/chat/completions", json=chat(seed=BREAKS, ignore_eos=True))
    message = check_error(response, 500, "server_error")
    assert "secret" not in message
    assert small.client.post("/v1/chat/completions", json=chat()).status_code == 200


def sent_by(response: EventStream, disconnect_after: float = 60) -> list[bytes]:
    """What a response sends to a client that goes away after a while."""
    sent = []

    async def receive():
        await asyncio.sleep(disconnect_after)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message.get("body", b""))

    asyncio.run(response({"type": "http"}, receive, send))
    return sent[1:-1] if not sent[-1] else sent[1:]


def test_silence_is_filled_with_comments():
    async def events():
        yield event({"number": 1})
        await asyncio.sleep(0.35)
        yield DONE

    sent = sent_by(EventStream(events(), contextlib.ExitStack(), 0.1, lambda: None))
    assert sent == [event({"number": 1}), PING, PING, PING, DONE]


def test_a_client_that_goes_away_is_noticed_in_silence():
    closed = []

    async def events():
        try:
            yield event({})
            await asyncio.sleep(60)
        finally:
            closed.append("events")

    resources = contextlib.ExitStack()
    resources.callback(closed.append, "resources")
    began = time.monotonic()
    sent_by(EventStream(events(), resources, 60, lambda: closed.append("noticed")), disconnect_after=0.05)
    assert time.monotonic() - began < 1
    assert sorted(closed) == ["events", "noticed", "resources"]


def test_the_official_client_ignores_comments(small):
    """The engine is busy for longer than the time between two comments."""
    client = OpenAI(base_url=small.url + "/v1", api_key="none", max_retries=0)
    body = chat(stream=True, seed=PAUSES)
    assert ": ping\n\n" in small.client.post("/v1/chat/completions", json=body).text
    assert all(chunk.choices for chunk in client.chat.completions.create(**body))


def test_clients_that_read_slowly_hold_nobody_up(server, post):
    """One takes a byte now and then, the others none. Their replies end all the same, at no more cost."""
    body = chat(stream=True, max_tokens=600, logprobs=True, top_logprobs=20, ignore_eos=True)
    before, ended = memory(server, "VmRSS"), server.metric("request_success_total")
    with contextlib.ExitStack() as connections:
        slow, *_ = [connections.enter_context(server.open(body)) for _ in range(4)]
        began = time.monotonic()
        assert post(chat()).status_code == 200  # the fifth of four slots
        while server.metric("request_success_total") < ended + 5:
            assert slow.recv(1)
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        server.wait_until_idle(1)
        assert memory(server, "VmRSS") - before < 200 * 2**20  # each is 2 MB of events
