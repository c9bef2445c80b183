"""Servers that tests of serving share, besides `server`, which all tests do.

Tests that kill a server, or change what it says of itself, start one of their own.
"""

from collections.abc import Callable, Iterator

import httpx
import pytest
from openai import OpenAI
from serving.process import ServerProcess

KEY = "sk-test-0123456789"


@pytest.fixture(scope="session")
def client(server) -> httpx.Client:
    return server.client


@pytest.fixture(scope="session")
def post(client) -> Callable[..., httpx.Response]:
    """Sends a body to chat completions."""
    return lambda body, path="/v1/chat/completions": client.post(path, json=body)


@pytest.fixture(scope="session")
def openai(server) -> OpenAI:
    """The official client."""
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def guarded() -> Iterator[ServerProcess]:
    """A server with keys, a page that may call it, and a limit of 1 MiB."""
    options = ("--api-key", KEY, "--cors-origin", "https://page.example", "--max-body-mb", "1", "--max-images", "2")
    options += ("--max-model-len", "192")
    with ServerProcess(*options, env={"QWENVL_API_KEY": "sk-from-environment"}) as process:
        yield process


@pytest.fixture(scope="session")
def small() -> Iterator[ServerProcess]:
    """A server with two places, whose engine goes wrong or is slow when it is asked to."""
    with ServerProcess("--max-queue", "2") as process:
        yield process


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
