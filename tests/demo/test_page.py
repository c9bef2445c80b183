"""What the page's events do when one comes in the middle of another; the rest is tested in a browser."""

import asyncio
from types import SimpleNamespace

import gradio as gr
import pytest

from qwenvl_jax.demo.client import Client
from qwenvl_jax.demo.page import ChatPage
from qwenvl_jax.demo.texts import EN

VISITOR = SimpleNamespace(session_hash="somebody")


@pytest.fixture
def page(server) -> ChatPage:
    with gr.Blocks() as blocks:
        return ChatPage(Client(f"{server.url}/v1"), EN, blocks)


def ask(page: ChatPage, question: str = "Hello") -> dict:
    values = {page.parts.field: {"text": question, "files": []}, page.parts.turns: ()}
    return values | dict.fromkeys(page.parts.settings.values())


async def under_way(page: ChatPage):
    """A reply that has shown its first words, and is asked for no more until the test does."""
    updates = page.send(ask(page), VISITOR)
    while page.parts.turns not in await anext(updates):
        pass
    return updates


def test_clear_speaks_after_the_last_words_of_a_reply(page):
    async def run():
        updates = await under_way(page)
        clearing = asyncio.create_task(page.clear(VISITOR))
        await asyncio.sleep(0.1)
        waited = not clearing.done()
        rest = [update async for update in updates]
        return waited, rest, await clearing

    waited, rest, cleared = asyncio.run(run())
    assert waited
    assert rest == []
    assert cleared[page.parts.chat] == []
    assert cleared[page.parts.turns] == ()


def test_a_second_question_ends_the_first(page):
    async def run():
        first = await under_way(page)
        second = page.send(ask(page, "How many?"), VISITOR)
        asking = asyncio.create_task(anext(second))
        await asyncio.sleep(0.1)
        assert not asking.done()
        assert [update async for update in first] == []
        await asking
        return [update async for update in second][-1]

    (turn,) = asyncio.run(run())[page.parts.turns]
    assert turn.question == "How many?"
    assert turn.reply


def test_a_reply_that_is_never_asked_for_more_holds_nobody_up(page, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.demo.under_way.SECONDS_FOR_LAST_WORDS", 0.1)

    async def run():
        updates = await under_way(page)
        cleared = await page.clear(VISITOR)
        await updates.aclose()
        return cleared

    assert asyncio.run(run())[page.parts.turns] == ()


def test_a_server_that_loads_is_heard_on_the_page(monkeypatch):
    async def none_yet():
        return None

    said = []
    with gr.Blocks() as blocks:
        client = Client("http://127.0.0.1:1/v1")
        monkeypatch.setattr(client, "card", none_yet)
        page = ChatPage(client, EN, blocks, said)
    assert asyncio.run(page.look())[page.parts.ready] == '<p role="status">loading the model …</p>'
    said += ["loading tiny", "compiling: 31 of 55 programs"]
    shown = asyncio.run(page.look())[page.parts.ready]
    assert shown == '<p role="status">loading the model … compiling: 31 of 55 programs</p>'
