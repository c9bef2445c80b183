"""What nobody should send, clients that go away, and more requests than there are places."""

import asyncio
import concurrent.futures
import json
import re
import subprocess
import sys
import time

import httpx
import orjson
import pytest
from openai import OpenAI
from serving.conftest import KEY
from serving.process import chat, check_error, picture, user
from serving.simple_engine import SLOW

from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.processing.tokenizer import Tokenizer

PATH = "/v1/chat/completions"


def post_raw(client: httpx.Client, content: bytes, path: str = PATH) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": "application/json"})


def with_value(field: str, value: str) -> bytes:
    """A body with a value that no JSON library would write."""
    return orjson.dumps(chat(**{field: "VALUE"})).replace(b'"VALUE"', value.encode())


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "n"])
def test_numbers_that_are_none(client, field, value):
    check_error(post_raw(client, with_value(field, value)), 400, "invalid_json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{",
        b'{"model": "\xc3"}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        with_value("n", "1" * 5000),
        with_value("messages", '"\\ud800"'),
        with_value("messages", r'[{"role":"user","content":"\ud800"}]'),
        json.dumps(chat()).encode("utf-16"),
    ],
    ids=["empty", "open", "bytes", "utf-8", "lists", "objects", "digits", "surrogate", "surrogate-in-text", "utf-16"],
)
def test_bodies_that_are_not_json(client, content):
    check_error(post_raw(client, content), 400, "invalid_json")


@pytest.mark.parametrize("content", [b"null", b"[]", b'"text"', b"1", b"{}"])
@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"])
def test_json_that_is_no_request(client, path, content):
    check_error(post_raw(client, content, path), 400)


def test_every_control_character_is_text(post):
    everything = "".join(map(chr, range(32))) + "\x7f\x80\u2028"
    assert post(chat(messages=user(everything))).status_code == 200


SPECIAL = (
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<imgpad>", "<box>", "</box>", "<ref>", "</ref>",
    "<quad>", "<|extra_0|>", "<|image_pad|>", "<|vision_start|>",
    "<img>/etc/passwd</img>", "<img>http://127.0.0.1:9/secret.png</img>", "<img>",
)  # fmt: skip


@pytest.mark.parametrize("text", SPECIAL)
@pytest.mark.parametrize("role", ["user", "system"])
def test_text_is_never_a_control_token(post, role, text):
    tokenizer = Tokenizer.from_file(locate("tiny") / "qwen.tiktoken", 64)
    messages = user(text) if role == "user" else [{"role": "system", "content": text}, *user("Hi")]
    counts = []
    for content in (messages, json.loads(json.dumps(messages).replace(json.dumps(text)[1:-1], "plain"))):
        tokenized = post({"model": "tiny", "messages": content}, "/tokenize").json()
        assert tokenized["image_tokens"] == 0
        counts.append([token for token in tokenized["tokens"] if token >= tokenizer.eod_id])
    assert counts[0] == counts[1]
    assert post(chat(messages=messages)).status_code == 200


def test_a_raw_prompt_is_text_too(post):
    tokenizer = Tokenizer.from_file(locate("tiny") / "qwen.tiktoken", 64)
    for text in SPECIAL:
        tokens = post({"model": "tiny", "prompt": text}, "/tokenize").json()["tokens"]
        assert max(tokens) < tokenizer.eod_id
        assert post({"model": "tiny", "tokens": tokens}, "/detokenize").json()["prompt"] == text


@pytest.mark.parametrize(
    "body",
    [
        chat(messages=[10**6 * "x"] * 10),
        chat(messages=[{"role": "x" * 10**7, "content": ""}]),
        chat(messages=user([{"type": "x" * 10**7}])),
        chat(messages=user([{"type": "text", "text": 1}] * 4000)),
        chat(model="x" * 10**7),
        chat(logit_bias={"x" * 10**7: 1}),
        chat(messages=user(["\u0000" * 10**6])),
        chat(model="\u0000" * 10**6),
        chat(messages=user([{"type": "image_url", "image_url": {"url": "\u0000" * 10**6}}])),
    ],
    ids=["strings", "role", "type", "many", "model", "key", "escapes", "escaped-model", "url"],
)
def test_large_mistakes_get_small_answers(post, body):
    check_error(post(body), 404 if len(body["model"]) > 4 else 400)


def test_a_body_that_is_too_large(guarded):
    key = {"authorization": "Bearer sk-from-environment"}
    body = orjson.dumps(chat(messages=user("x" * 2**20)))
    headers = key | {"content-type": "application/json"}
    assert "1 MiB" in check_error(guarded.client.post(PATH, content=body, headers=headers), 413, "request_too_large")

    def in_pieces():
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    assert "1 MiB" in check_error(guarded.client.post(PATH, content=in_pieces(), headers=headers), 413)
    assert guarded.client.get("/v1/models", headers=key).status_code == 200


def test_too_many_pictures(guarded):
    headers = {"authorization": "Bearer sk-from-environment"}
    for number, status in ((3, 400), (2, 200)):
        body = chat(messages=user([picture()] * number + [{"type": "text", "text": "?"}]))
        assert guarded.client.post(PATH, json=body, headers=headers).status_code == status


@pytest.mark.parametrize("stream", [True, False])
def test_many_clients_go_away(server, post, stream):
    """Two hundred at once, none of which waits for its answer: nothing stays behind, and the next one is served."""

    async def crowd():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
            body = chat(stream=stream, max_tokens=500, ignore_eos=True)
            tasks = [asyncio.create_task(client.post(PATH, json=body)) for _ in range(200)]
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    end = time.monotonic() + 5
    while (status := post(chat(max_tokens=1)).status_code) != 200:
        assert status == 429  # until the server has noticed all of them
        assert time.monotonic() < end
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_its_place_back(small, stream):
    """While its reply is generated, and while it waits for another's."""
    before = small.metric("client_disconnects_total")
    body = chat(stream=stream, seed=SLOW, max_tokens=600, ignore_eos=True)
    connections = [small.open(body) for _ in range(2)]  # the second waits for the first
    time.sleep(0.4)
    assert small.metric("num_requests_running") + small.metric("num_requests_waiting") == 2
    for connection in reversed(connections):
        connection.close()
    small.wait_until_idle(10)  # of the thirty seconds and more that both replies would take
    assert small.client.post(PATH, json=chat(max_tokens=1)).status_code == 200
    assert small.metric("client_disconnects_total") == before + 2


def fill(small, pool: concurrent.futures.Executor, tokens: int) -> list[concurrent.futures.Future]:
    """Takes both places of a server for a while."""
    body = chat(seed=SLOW, max_tokens=tokens, ignore_eos=True)
    taken = [pool.submit(small.client.post, PATH, json=body) for _ in range(2)]
    end = time.monotonic() + 5
    while small.metric("num_requests_running") + small.metric("num_requests_waiting") < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    return taken


def test_a_full_server_says_so_at_once(small):
    """Before it reads the pictures of a request."""
    large = chat(
        messages=user([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5 * 2**20}}])
    )
    content = orjson.dumps(large)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        taken = fill(small, pool, 15)
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            response = post_raw(small.client, content)
            seconds.append(time.monotonic() - began)
            check_error(response, 429, "rate_limit_exceeded")
            assert 1 <= int(response.headers["retry-after"]) <= 30
        assert min(seconds) < 0.05
        check_error(small.client.post(PATH, json=chat(n=3)), 429)
        assert [each.result().status_code for each in taken] == [200, 200]
    check_error(small.client.post(PATH, json=chat(n=3)), 400, param="n")


def test_the_official_client_comes_again(small):
    client = OpenAI(base_url=small.url + "/v1", api_key="none", max_retries=4)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        taken = fill(small, pool, 12)
        assert client.chat.completions.create(**chat()).choices
        assert [each.result().status_code for each in taken] == [200, 200]


def test_a_mixed_batch_is_as_each_alone(post):
    bodies = [
        chat(max_tokens=12),
        chat(messages=user([picture(), {"type": "text", "text": "Which colour?"}]), max_tokens=12),
        chat(messages=user([picture("blue"), picture("green")]), max_tokens=12),
        chat(logprobs=True, top_logprobs=3, max_tokens=12),
        chat(n=2, temperature=1, seed=4, max_tokens=12),
        chat(max_tokens=12, response_format={"type": "regex", "regex": "(red|blue) [0-9]{2} (circles|squares)"}),
        chat(stop=["5"], max_tokens=12),
        chat(messages=user("word " * 300), repetition_penalty=1.3, max_tokens=12),
    ]

    def answers(reply: httpx.Response) -> list:
        choices = reply.json()["choices"]
        return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]

    alone = [answers(post(body)) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: answers(post(body)), bodies))
    assert together == alone


def test_generated_requests_never_break_the_server(guarded, tmp_path):
    """schemathesis makes requests of /openapi.json, right ones and wrong ones, for every route."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", guarded.url + "/openapi.json"]
    command += ["--checks", checks + ",negative_data_rejection", "--phases", "fuzzing", "--max-examples", "10"]
    command += ["--seed", "1", "--header", f"authorization: Bearer {KEY}", "--request-timeout", "60"]
    # It keeps what it found in the current folder.
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    routes = re.search(r"Selected: (\d+)/\1\n\s+Tested: \1\n", run.stdout)
    assert routes, run.stdout[-3000:]
    assert int(routes[1]) >= 13


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/tokenize"])
def test_a_text_that_is_far_too_long_is_refused_before_it_is_read(client, path):
    text = "a b " * (5 * 2**20)
    body = {"model": "tiny"} | ({"messages": user(text)} if path == PATH else {"prompt": text})
    began = time.monotonic()
    check_error(client.post(path, json=body), 400, "context_length_exceeded")
    assert time.monotonic() - began < 2
