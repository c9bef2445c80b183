"""What whoever runs a server relies on: probes, numbers, keys, and how it starts and stops."""

import concurrent.futures
import contextlib
import io
import json
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from processes import REPOSITORY
from serving.conftest import KEY
from serving.process import REAL, ServerProcess, chat, check_error, encoded, user
from serving.simple_engine import BLOCKS, DIES, SLOW, STALLS

PATH = "/v1/chat/completions"


def test_probes_answer_while_pictures_are_prepared(server):
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    body = chat(messages=user([encoded(buffer.getvalue())]), max_tokens=1)
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(server.client.post, PATH, json=body) for _ in range(10)]
        seconds = []
        while not all(answer.done() for answer in answers):
            began = time.monotonic()
            assert server.client.get("/health").status_code == 200
            seconds.append(time.monotonic() - began)
        assert {answer.result().status_code for answer in answers} == {200}
    assert np.median(seconds) < 0.05


def test_numbers_are_exact(server, post):
    names = {"prompt": "prompt_tokens_total", "completion": "generation_tokens_total", "image": "image_tokens_total"}
    before = {name: server.metric(metric) for name, metric in names.items()}
    usages = [
        post(chat()).json()["usage"],
        post(chat(n=3, temperature=1)).json()["usage"],
        post(chat(messages=user([encoded(_png()), {"type": "text", "text": "?"}]))).json()["usage"],
        post({"model": "tiny", "prompt": ["a", "b"], "max_tokens": 3}, "/v1/completions").json()["usage"],
    ]
    stream = post(chat(stream=True, stream_options={"include_usage": True})).text.split("\n\n")
    usages.append(json.loads(stream[-3].removeprefix("data: "))["usage"])
    grown = {name: server.metric(metric) - before[name] for name, metric in names.items()}
    assert grown["prompt"] == sum(usage["prompt_tokens"] for usage in usages)
    assert grown["completion"] == sum(usage["completion_tokens"] for usage in usages)
    assert grown["image"] == sum(usage["prompt_tokens_details"]["image_tokens"] for usage in usages) == 64
    for usage in usages:
        details = usage["prompt_tokens_details"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] == details["image_tokens"] + details["text_tokens"]


def test_counts_of_replies_and_requests(server, post):
    def counts():
        ended = server.metric("request_success_total", finished_reason="length")
        return ended, server.metric("http_requests_total", route=PATH, status="400")

    ended, wrong = counts()
    post(chat(n=2, ignore_eos=True))
    post(chat(n=0))
    assert counts() == (ended + 2, wrong + 1)


def test_where_the_time_of_a_reply_goes(server, post):
    """The parts of each reply that came to its end make up the whole, and lie within what the client waited for."""
    names = ("queue", "prefill", "decode", "inference")

    def sums() -> tuple[dict[str, float], set[float]]:
        counts = {server.metric(f"request_{name}_time_seconds_count") for name in names}
        return {name: server.metric(f"request_{name}_time_seconds_sum") for name in names}, counts

    (before, (count,)), began = sums(), time.monotonic()
    assert post(chat(n=2, ignore_eos=True, max_tokens=40)).status_code == 200
    waited = time.monotonic() - began
    after, (later,) = sums()
    queue, prefill, decode, inference = (after[name] - before[name] for name in names)
    assert later == count + 2
    assert inference == pytest.approx(prefill + decode)
    assert prefill > 0
    assert decode > 0
    assert 0 < queue + inference < 2 * waited


def test_no_series_says_when_it_was_made(client):
    assert "_created" not in client.get("/metrics").text


def test_a_picture_that_was_there_before_is_a_hit(server, post):
    def counts():
        return server.metric("mm_cache_queries_total"), server.metric("mm_cache_hits_total")

    buffer = io.BytesIO()
    Image.new("RGB", (31, 17), (1, 2, 3)).save(buffer, "PNG")
    body = chat(messages=user([encoded(buffer.getvalue())]))
    queries, hits = counts()
    first = post(body).json()["choices"][0]
    assert counts() == (queries + 1, hits)
    assert post(body).json()["choices"][0] == first
    assert counts() == (queries + 2, hits + 1)


def test_nothing_is_compiled_after_the_start(server, post):
    random = np.random.default_rng(1)

    def ask(_):
        words = "word " * int(random.integers(1, 400))
        pictures = [encoded(_png())] * int(random.integers(0, 3))
        content = [*pictures, {"type": "text", "text": words}]
        n, most, temperature = int(random.integers(1, 3)), int(random.integers(1, 20)), float(random.random())
        body = chat(messages=user(content), temperature=temperature, n=n, max_tokens=most, logprobs=most % 2 == 0)
        some = random.random(4) < 0.3
        body |= {"repetition_penalty": 1.2, "presence_penalty": 0.5} if some[0] else {}
        body |= {"logit_bias": {"7": -1}, "stop": ["x"], "stop_token_ids": [5]} if some[1] else {}
        body |= {"top_k": 5, "min_p": 0.1, "seed": most} if some[2] else {"top_p": 0.5}
        body |= {"response_format": {"type": "regex", "regex": "[a-z ]{5,90}"}} if some[3] else {}
        return post(body).status_code

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(40))) == {200}
    assert server.metric("recompiles_total") == 0


def test_a_log_line_for_each_request_without_its_text(server, client):
    identity = "log-test-1"
    client.post(PATH, json=chat(messages=user("a very private word")), headers={"x-request-id": identity})
    line = json.loads(server.line(identity).string)
    assert line["message"] == "request"
    assert (line["method"], line["route"], line["status"]) == ("POST", PATH, 200)
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] > 0
    assert line["seconds"] > 0
    assert not any("private" in line for line in server.lines)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", f"bearer {KEY}", f"Bearer  {KEY}", f"Bearer {KEY},", f"Bearer {KEY[:-1]}",
     f"Bearer {KEY}x", KEY, f"Basic {KEY}", "Bearer é"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nothing"])
def test_a_missing_or_wrong_key(guarded, path, header):
    headers = {} if header is None else {"authorization": header.encode()}
    response = guarded.client.get(path, headers=headers)
    check_error(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1/../metrics", "/health/../metrics", "/health/", "/health/../v1/models", "/Health",
     "/v1/models/", "/health%2f..%2fmetrics", "/./metrics", "/health;/metrics", "/openapi.json", "//health/../metrics"],
)  # fmt: skip
def test_no_spelling_of_a_path_goes_round_the_key(guarded, path):
    """Sent as it is: clients tidy paths."""
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] == b"401"


@pytest.mark.parametrize("key", [KEY, "sk-from-environment"])
def test_each_key_opens(guarded, key):
    for path in ("/v1/models", "/metrics"):
        assert guarded.client.get(path, headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_probes_need_no_key(guarded):
    assert guarded.client.get("/health").json() == {"status": "ready"}
    assert guarded.client.get("/ready").json() == {"status": "ready"}


def test_it_answers_while_it_loads():
    with ServerProcess("--loading-seconds", "1.5", wait=False) as server:
        assert server.client.get("/health").json() == {"status": "loading"}
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/v1/models").status_code == 200
        response = server.client.post(PATH, json=chat())
        check_error(response, 503, "server_error")
        assert int(response.headers["retry-after"]) > 0
        server.wait_until_ready()
        assert server.client.get("/ready").status_code == 200
        assert server.client.post(PATH, json=chat(max_tokens=1)).status_code == 200


def ask_slowly(server: ServerProcess, pool: concurrent.futures.Executor, tokens: int, stream: bool = False):
    """An answer that takes 0.1 s a token, under way."""
    body = chat(stream=stream, seed=SLOW, max_tokens=tokens, ignore_eos=True)
    answer = pool.submit(server.client.post, PATH, json=body)
    while not server.metric("num_requests_running"):
        time.sleep(0.02)
    return answer


def test_told_to_stop_it_finishes_what_is_under_way():
    with ServerProcess() as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole = ask_slowly(server, pool, 12)
        server.terminate()
        time.sleep(0.3)
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        response = server.client.post(PATH, json=chat())
        check_error(response, 503, "server_error")
        assert "retry-after" in response.headers
        assert whole.result().json()["usage"]["completion_tokens"] == 12
        assert server.process.wait(5) == 0


def test_what_takes_too_long_to_finish_ends_in_an_error():
    with ServerProcess("--drain-seconds", "0.5") as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = ask_slowly(server, pool, 100, stream=True)
        waiting = pool.submit(server.client.post, PATH, json=chat())
        time.sleep(0.1)
        server.terminate()
        events = stream.result().text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["type"] == "server_error"
        assert events[-2:] == ["data: [DONE]", ""]
        check_error(waiting.result(), 503, "server_error")
        assert server.process.wait(5) == 0


def test_told_twice_it_stops_at_once():
    with ServerProcess() as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = ask_slowly(server, pool, 1000)
        server.terminate()
        time.sleep(0.2)
        began = time.monotonic()
        server.terminate()
        assert server.process.wait(2) == 0
        assert time.monotonic() - began < 1
        with contextlib.suppress(Exception):
            answer.result()


def test_an_engine_that_dies():
    """What waits for it gets an error, and nobody is told that all is well."""
    with ServerProcess() as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.client.post, PATH, json=chat(seed=SLOW, ignore_eos=True))
        time.sleep(0.2)
        stream = server.client.post(PATH, json=chat(stream=True, seed=DIES, ignore_eos=True))
        assert json.loads(stream.text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"] == "server_error"
        assert waiting.result().status_code == 200
        for path in ("/health", "/ready"):
            assert server.client.get(path).status_code == 503
        assert server.client.get("/health").json() == {"status": "dead"}
        response = server.client.post(PATH, json=chat())
        check_error(response, 503, "server_error")
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("seed", [STALLS, BLOCKS], ids=["in a reply", "before it"])
def test_an_engine_that_hangs(seed):
    with (
        ServerProcess("--request-timeout", "6", "--stall-seconds", "1") as server,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        server.client.post(PATH, json=chat(max_tokens=1))
        answer = pool.submit(server.client.post, PATH, json=chat(seed=seed, ignore_eos=True))
        end = time.monotonic() + 10
        while server.client.get("/health").status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert server.client.get("/health").json() == {"status": "stuck"}
        check_error(server.client.post(PATH, json=chat()), 503, "server_error")
        response = answer.result()
        check_error(response, 504, "timeout")
        assert response.headers["x-should-retry"] == "false"
        server.terminate()
        assert server.process.wait(8) == 0


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REAL), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port"),
        (["--slots", "0"], "--slots"),
        (["--slot"], "--slot"),
        (["--request-timeout", "soon"], "--request-timeout"),
        (["--stall-seconds", "-1"], "--stall-seconds"),
        (["--dtype", "float8"], "--dtype"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
        (["--api-key", "two words"], "API key"),
        (["--host", "256.1.1.1"], "256.1.1.1"),
        (["--allowed-host", "example.com"], "--allow-urls"),
        (["--mesh", "tensors=2"], "--mesh"),
        (["--mesh", "tensor=2,tensor=2"], "--mesh"),
        (["--mesh", "tensor=0"], "--mesh"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_are_wrong(options, message):
    done = run("--port", "0", *options)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("serve: ")
    assert message in line


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--port", str(port))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "--port" in line


@pytest.mark.parametrize(
    "options", [["--checkpoint", "tinny"], ["--max-model-len", "100000"], ["--mesh", "data=100,tensor=2"]], ids=str
)
def test_a_model_that_cannot_be_served(options):
    done = run("--port", "0", *options)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("serve: ")


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()
