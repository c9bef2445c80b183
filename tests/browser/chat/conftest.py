"""The chat page with servers behind it, and visitors."""

from collections.abc import Callable, Iterator

import pytest
from browser.chat_page import Chat, DemoProcess
from serving.process import ServerProcess


@pytest.fixture(scope="session")
def demo(server) -> Iterator[DemoProcess]:
    """The page for the tiny model as serve.py serves it."""
    with DemoProcess("--api-base", f"{server.url}/v1") as process:
        yield process


@pytest.fixture
def chat(page, demo) -> Chat:
    return Chat(page, demo.address)


@pytest.fixture
def open_chat(new_page, demo) -> Callable[..., Chat]:
    """Another visitor; takes Playwright's options of a context."""

    def make(path: str = "/", **options) -> Chat:
        return Chat(new_page(**({"viewport": {"width": 1280, "height": 900}} | options)), demo.address, path)

    return make


@pytest.fixture(scope="session")
def simple() -> Iterator[ServerProcess]:
    """A server that answers one request after another, slowly or not at all when it is asked to, and has few places."""
    with ServerProcess("--max-queue", "1", "--max-model-len", "256") as process:
        yield process


@pytest.fixture(scope="session")
def simple_demo(simple) -> Iterator[DemoProcess]:
    with DemoProcess("--api-base", f"{simple.url}/v1") as process:
        yield process


@pytest.fixture
def simple_chat(page, simple_demo) -> Chat:
    return Chat(page, simple_demo.address)
