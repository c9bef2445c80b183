"""The chat page, served for real and driven over HTTP by Gradio's client; the model has random weights."""

from collections.abc import Iterator

import pytest
from gradio_client import Client, handle_file

import qwenvl_jax
from qwenvl_jax.demo import app
from qwenvl_jax.demo.app import Turn


@pytest.fixture(scope="module")
def address(fixtures) -> Iterator[str]:
    page = app.build(qwenvl_jax.load(fixtures / "qwen-vl-chat-tiny"))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address
    page.close()


@pytest.fixture
def client(address) -> Client:
    return Client(address, verbose=False)


def ask(client: Client, question: str, *pictures) -> tuple[list[dict], dict]:
    """The conversation that the page shows after the reply, and what is left in the input field."""
    submitted = {"text": question, "files": [handle_file(str(picture)) for picture in pictures]}
    return client.predict(submitted, api_name="/answer")


def test_a_question_about_a_picture_is_answered(client, fixtures):
    conversation, _ = ask(client, "What is this?", fixtures / "images" / "shapes.png")
    assert [message["role"] for message in conversation] == ["user", "assistant"]
    picture, question = conversation[0]["content"]
    assert picture["type"] == "file"
    assert question["text"] == "What is this?"
    assert conversation[1]["content"][0]["text"]


def test_a_visitor_keeps_a_conversation_and_can_retry_and_clear(client):
    ask(client, "Hello")
    conversation, _ = ask(client, "And again?")
    assert [message["role"] for message in conversation] == ["user", "assistant"] * 2
    assert len(client.predict(api_name="/again")) == 4
    client.predict(api_name="/clear")
    conversation, _ = ask(client, "Hello")
    assert len(conversation) == 2


def test_visitors_do_not_see_each_other(address):
    first, second = Client(address, verbose=False), Client(address, verbose=False)
    ask(first, "A secret")
    conversation, _ = ask(second, "Hello")
    assert len(conversation) == 2


def test_a_file_that_is_no_picture_leaves_the_conversation_and_the_question(client, tmp_path):
    ask(client, "Hello")
    (tmp_path / "text.png").write_text("this is no picture")
    conversation, field = ask(client, "What is this?", tmp_path / "text.png")
    assert len(conversation) == 2
    assert field["text"] == "What is this?"


def test_the_model_reads_its_own_notation_and_the_page_does_not():
    reply = "<ref>the cat</ref><box>(1,2),(3,4)</box>"
    turns = (Turn("Where?", ("a.png", "b.png"), reply, "boxes.png"), Turn("Why?"))
    first, second, third = app.messages(turns)
    assert [part["type"] for part in first["content"]] == ["image", "image", "text"]
    assert second == {"role": "assistant", "content": reply}
    assert third["content"] == [{"type": "text", "text": "Why?"}]
    assert app.bubbles(turns)[1]["content"] == ["the cat", {"path": "boxes.png"}]
