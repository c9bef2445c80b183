"""The page's client against the tiny model's real server; how the page shows what it says is tested in a browser."""

import asyncio
import itertools
import socket

import pytest

from qwenvl_jax.demo.client import Answer, AskError, Client


async def answers(client: Client, **changes) -> list[Answer]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 8}
    return [answer async for answer in client.ask(body | {"stream_options": {"include_usage": True}} | changes)]


def test_an_answer_grows_and_says_at_last_how_it_ended(server):
    async def run():
        client = Client(f"{server.url}/v1")
        return await client.card(), await answers(client)

    card, found = asyncio.run(run())
    assert card.name == "tiny"
    assert card.ours
    assert set(card.defaults) >= {"temperature", "top_p", "top_k"}
    texts = [answer.text for answer in found]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    last = found[-1]
    assert last.finish in ("stop", "length")
    assert all(answer.finish is None for answer in found[:-1])
    assert last.request_id
    assert last.tokens
    assert last.picture_tokens == 0
    assert 0 < last.first <= last.last


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"messages": [{"role": "user", "content": "star " * 3000}]}, "too_long"),
        ({"temperature": -1}, "refused"),
        ({"model": "missing"}, "refused"),
    ],
)
def test_what_a_server_refuses_is_said_in_its_words(server, changes, kind):
    with pytest.raises(AskError) as error:
        asyncio.run(answers(Client(f"{server.url}/v1"), **changes))
    assert error.value.kind == kind
    assert "Error code" not in error.value.details["message"]
    assert "{" not in error.value.details["message"]


def test_a_server_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}/v1")
    with pytest.raises(AskError) as error:
        asyncio.run(answers(client))
    assert error.value.kind == "lost"
    assert str(port) in error.value.details["base"]


def test_a_model_that_a_server_does_not_have_is_named(server):
    with pytest.raises(AskError) as error:
        asyncio.run(Client(f"{server.url}/v1", model="missing").card())
    assert error.value.kind == "no_model"
    assert "tiny" in error.value.details["names"]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n", "cut_off"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: [DONE]\n\n", "cut_off"),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "key"),
        (b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n", "too_large"),
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 4\r\n\r\nhtml", "refused"),
        (b"", "lost"),
    ],
)
def test_strange_servers_are_errors_in_words(reply, kind):
    async def serve(reader, writer):
        await reader.read(1000)
        writer.write(reply)
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(AskError) as error:
                await answers(Client(f"http://127.0.0.1:{port}/v1"))
            assert error.value.kind == kind

    asyncio.run(run())
