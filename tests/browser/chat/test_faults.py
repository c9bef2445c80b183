"""What is stopped, refused, broken, killed or gone leaves the conversation as it was."""

import re
import signal

import pytest
from browser.chat_page import CAPTION, PATIENCE, TILES, WHERE, WORD, Chat, DemoProcess
from playwright.sync_api import expect
from serving.process import ServerProcess
from serving.simple_engine import BREAKS, SLOW

pytestmark = pytest.mark.browser


def test_escape_stops_a_reply_which_keeps_what_it_has(simple_chat, simple):
    simple_chat.setting("seed").fill(str(SLOW))
    simple_chat.add(TILES)
    simple_chat.send(CAPTION)
    expect(simple_chat.replies.last).to_contain_text("a small", timeout=PATIENCE)
    simple_chat.page.keyboard.press("Escape")
    expect(simple_chat.replies.last).to_contain_text("stopped")
    simple.wait_until_idle()
    text = simple_chat.reply
    assert len(text) < 80, text
    simple_chat.setting("seed").fill("")
    assert simple_chat.ask("How many objects are there?") != ""


def test_the_stop_button_and_clear_in_the_middle(simple_chat, simple):
    simple_chat.setting("seed").fill(str(SLOW))
    simple_chat.add(TILES)
    simple_chat.send(CAPTION)
    simple_chat.page.locator("#field .stop-button").click()
    expect(simple_chat.page.locator("#field [data-testid=submit-button]")).to_be_visible()
    simple.wait_until_idle()
    simple_chat.page.get_by_label("Retry").click()
    expect(simple_chat.replies.last).to_contain_text("a small", timeout=PATIENCE)
    simple_chat.page.get_by_label("Clear", exact=True).first.click()
    expect(simple_chat.replies).to_have_count(0)
    simple.wait_until_idle()
    simple_chat.page.wait_for_timeout(500)
    expect(simple_chat.replies).to_have_count(0)  # what was under way did not come back


def test_closing_the_page_frees_the_slot(simple_chat, simple):
    simple_chat.setting("seed").fill(str(SLOW))
    simple_chat.add(TILES)
    simple_chat.send(CAPTION)
    expect(simple_chat.replies.last).to_contain_text("a small", timeout=PATIENCE)
    simple_chat.page.close()
    simple.wait_until_idle()


def test_a_full_server_a_failure_and_a_long_history_leave_the_conversation(simple_chat, simple):
    chat = simple_chat
    chat.ask("How many objects are there?", TILES)

    connection = simple.open(
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": SLOW, "min_tokens": 60}
    )
    with connection:
        while not simple.metric("num_requests_running"):
            pass
        chat.send("Is there a star?")
        expect(chat.notice).to_contain_text("The server is full. Send the question again in", timeout=PATIENCE)
        expect(chat.field).to_have_value("Is there a star?")
        expect(chat.replies).to_have_count(1)
    simple.wait_until_idle()
    chat.field.press("Enter")
    chat.wait(2)
    expect(chat.notice).to_have_text("")

    chat.send("star " * 300)
    expect(chat.notice).to_contain_text("The conversation is too long: ", timeout=PATIENCE)
    expect(chat.replies).to_have_count(2)

    chat.setting("seed").fill(str(BREAKS))
    chat.send(CAPTION)
    expect(chat.notice).to_contain_text("The server failed on this request", timeout=PATIENCE)
    assert "/root" not in chat.page.content()
    chat.setting("seed").fill("")
    chat.ask("Is there a star?")


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.png", WORD.read_bytes()[:300]), ("text.png", b"no picture"), ("empty.png", b"")],
)
def test_a_broken_picture_leaves_the_conversation_and_the_question(chat, tmp_path, name, content):
    chat.ask(WHERE, WORD)
    (tmp_path / name).write_bytes(content)
    chat.add(tmp_path / name)
    chat.send("What is this?")
    expect(chat.notice).to_contain_text(name, timeout=PATIENCE)
    assert "/tmp" not in chat.notice.inner_text()
    expect(chat.field).to_have_value("What is this?")
    expect(chat.replies).to_have_count(1)


def test_a_picture_that_is_too_large_is_refused(chat, tmp_path):
    (tmp_path / "large.bmp").write_bytes(b"BM" + bytes(11 * 2**20))
    chat.page.set_input_files("#field input[type=file]", str(tmp_path / "large.bmp"))
    expect(chat.page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first).to_be_visible()


def test_a_server_that_is_killed_and_comes_back(new_page):
    port = "0"
    with ServerProcess() as server:
        port = server.url.rpartition(":")[2]
        with DemoProcess("--api-base", f"{server.url}/v1") as demo:
            chat = Chat(new_page(), demo.address)
            chat.ask("How many objects are there?", TILES)
            chat.setting("seed").fill(str(SLOW))
            chat.send(CAPTION)
            expect(chat.replies.last).to_contain_text("a small", timeout=PATIENCE)
            server.process.send_signal(signal.SIGKILL)
            expect(chat.notice).to_contain_text("ended in the middle", timeout=PATIENCE)
            expect(chat.replies.last).to_contain_text("the connection ended here")
            chat.setting("seed").fill("")
            chat.send("Is there a star?")
            expect(chat.notice).to_contain_text("does not answer", timeout=PATIENCE)
            expect(chat.field).to_have_value("Is there a star?")
            expect(chat.replies).to_have_count(2)
            with ServerProcess("--port", port):
                chat.field.press("Enter")
                chat.wait(3)
                chat.again()


def test_its_own_server(new_page, tmp_path):
    """The default: the page is there before the model, says so, then answers; SIGTERM ends both with status 0.

    What visitors have uploaded is gone then, too.
    """
    uploads = tmp_path / "uploads"
    with DemoProcess("--cpu-only", env={"GRADIO_TEMP_DIR": str(uploads)}) as demo:
        page = new_page()
        page.goto(demo.address)
        expect(page.locator("#ready")).to_contain_text("loading the model")
        page.locator("#field textarea").fill("Hello")
        page.locator("#field textarea").press("Enter")
        expect(page.locator("#notice")).to_contain_text("still being loaded")
        expect(page.locator("#ready")).to_contain_text("tiny is ready", timeout=10 * PATIENCE)
        chat = Chat(page, demo.address)
        assert chat.ask(WHERE, WORD) == "yellow cross [1]"
        assert list(uploads.rglob("word.png"))
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(30) == 0
        assert [path for path in uploads.rglob("*") if path.is_file()] == []


def test_a_model_that_is_not_there_ends_the_demo_with_a_line(tmp_path):
    with DemoProcess("--checkpoint", str(tmp_path)) as demo:
        assert demo.process.wait(60) == 2
        line = demo.line("^demo: ")
    assert str(tmp_path) in line.string
