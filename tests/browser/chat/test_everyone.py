"""The page for everyone: languages, phones, keyboards, what axe finds; and for nobody what is not theirs."""

import httpx
import pytest
from browser.accessibility import serious_faults
from browser.chat_page import REPOSITORY, WHERE, WORD, Chat
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_chinese(open_chat):
    chat = open_chat("/zh", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert chat.page.evaluate("document.documentElement.lang") == "zh"
    assert chat.ask("框出黄色十字形的位置。", WORD) == "黄色十字形 [1]"
    expect(chat.page.locator("#view")).to_contain_text("回复中的方框")
    assert "自然结束" in chat.status.inner_text()


def test_a_phone_needs_no_scrolling_to_the_side(open_chat):
    chat = open_chat(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    chat.ask(WHERE, WORD)
    assert chat.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    field = chat.field.bounding_box()
    assert field["width"] > 150
    assert chat.page.locator("#view svg").first.bounding_box()["width"] <= 390


def test_keyboard_only(chat):
    """From the field, which has the focus, to the cards and back, then a question, without a mouse."""
    page = chat.page
    expect(chat.field).to_be_focused()
    page.keyboard.type("How many objects are there?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("In the picture.")
    assert chat.field.input_value() == "How many objects are there?\nIn the picture."
    page.keyboard.press("Control+A")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    chat.wait(1)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
    for name in ("Retry", "Undo", "Edit", "Copy message", "Clear", "Upload a file", "Question"):
        assert name in reached, (name, reached)
    assert any(name.startswith("Settings") for name in reached if name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_chat, scheme):
    chat = open_chat(color_scheme=scheme)
    assert serious_faults(chat.page) == []
    chat.ask(WHERE, WORD)
    for name in ("#settings", "#code", "#more"):
        chat.page.locator(f"{name} > button").click()
    chat.page.wait_for_timeout(500)  # folds open
    assert serious_faults(chat.page) == []


def test_the_page_names_no_file_of_the_machine_and_opens_none(demo):
    folder = REPOSITORY
    for path in ("/etc/passwd", str(folder / "README.md"), f"{folder}/qwenvl_jax/demo/page.py", "../README.md"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            reply = httpx.get(demo.address + route + path)
            assert reply.status_code in (403, 404), (route, path, reply.status_code)
    upload = httpx.post(f"{demo.address}/gradio_api/upload", files={"files": ("../../evil.png", b"x")})
    assert all("/../" not in path for path in upload.json()), upload.text


def test_nothing_is_fetched_from_elsewhere(new_page, demo):
    """The fixture lets nothing out; nothing may even try."""
    page = new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    Chat(page, demo.address).ask("Hello")
    assert [url for url in asked if not url.startswith((demo.address, "data:", "blob:"))] == []
