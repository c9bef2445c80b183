"""Conversations on the chat page, against the real server with the tiny model."""

import base64
import json
import re
from pathlib import Path

import pytest
from browser.chat_page import CAPTION, NUMBER, PATIENCE, TILES, WHERE, WORD
from PIL import Image
from playwright.sync_api import expect
from serving.process import ServerProcess

from qwenvl_jax.processing.boxes import parse

pytestmark = pytest.mark.browser


def answer(server: ServerProcess, question: str, *pictures: Path) -> str:
    """What the server says, asked without the page."""
    content: list[dict] = []
    for path in pictures:
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question})
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    return server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_a_box_is_drawn_where_the_reply_says(chat, server):
    assert chat.ask(WHERE, WORD) == "yellow cross [1]"
    with Image.open(WORD) as picture:
        (box,) = parse(answer(server, WHERE, WORD), picture.size)
        width = picture.width
    assert chat.boxes.locator("td").all_inner_texts()[-4:] == [str(c) for c in (box.x1, box.y1, box.x2, box.y2)]
    shown = chat.page.locator("#view img").first.bounding_box()
    drawn = chat.page.locator("#view svg g rect").first.bounding_box()
    scale = shown["width"] / width
    assert abs(drawn["x"] + drawn["width"] / 2 - shown["x"] - (box.x1 + box.x2) / 2 * scale) < 1.5
    assert abs(drawn["y"] + drawn["height"] / 2 - shown["y"] - (box.y1 + box.y2) / 2 * scale) < 1.5
    assert abs(drawn["width"] - (box.x2 - box.x1) * scale) < 6  # the line's own width
    assert "64 tokens of pictures" in chat.status.inner_text()
    assert "ended by itself" in chat.status.inner_text()


def test_a_conversation_of_several_turns_and_pictures(chat, server):
    assert chat.ask("What is written in Picture 2?", WORD, NUMBER) == "860"
    assert chat.ask("What is written in Picture 1?") == "FAN"
    chat.ask("Describe the picture.", TILES)
    assert chat.page.locator("#view").get_by_role("button", name=re.compile("Picture [123]")).count() == 3
    assert "192 tokens of pictures" in chat.status.inner_text()


def test_boxes_are_on_the_latest_picture_and_the_other_one_can_be_shown(chat):
    chat.ask(WHERE, NUMBER, WORD)
    expect(chat.boxes).to_have_count(1)
    first, second = (chat.page.locator("#view").get_by_role("button", name=f"Picture {n}") for n in (1, 2))
    expect(second).to_have_attribute("aria-pressed", "true")
    first.click()
    expect(first).to_have_attribute("aria-pressed", "true")
    expect(chat.page.locator("#view svg g rect")).to_have_count(0)


def test_regenerate_edit_undo_and_clear(chat):
    chat.ask(WHERE, WORD)
    chat.again()
    assert chat.reply == "yellow cross [1]"

    chat.page.get_by_label("Edit").click()
    chat.page.locator("#chat textarea").fill("What color is the cross?")
    chat.page.locator("#chat [aria-label=Submit]").click()
    expect(chat.replies.last).to_have_text("yellow", timeout=PATIENCE)
    assert chat.page.locator("#chat .message img").count() == 1  # still about the picture

    chat.page.get_by_role("button", name="Undo").click()
    expect(chat.field).to_have_value("What color is the cross?")
    expect(chat.page.locator("#field .thumbnail-item")).to_have_count(1)
    expect(chat.replies).to_have_count(0)

    chat.field.press("Enter")
    chat.wait(1)
    chat.page.get_by_label("Clear", exact=True).first.click()
    expect(chat.replies).to_have_count(0)
    expect(chat.page.locator("#view")).to_contain_text("Pictures and their boxes appear here.")


@pytest.mark.parametrize("number", range(9))
def test_every_card_asks_its_question(chat, number):
    chat.page.locator("#chat .example").nth(number).click()
    chat.wait(1)
    assert chat.reply not in ("", "–")
    if number == 8:
        assert set(json.loads(chat.reply)) == {"objects", "description"}


def test_two_visitors_at_once_do_not_see_each_other(open_chat):
    first, second = open_chat(), open_chat()
    first.add(WORD)
    second.add(NUMBER)
    first.send(CAPTION)
    second.send(CAPTION)
    first.wait(1)
    second.wait(1)
    assert "FAN" in first.reply
    assert "860" in second.reply
    assert "860" not in first.page.locator("#chat").inner_text()
    assert "number.png" not in first.page.locator("#view").inner_html()
    first.page.reload()
    expect(first.replies).to_have_count(0)
