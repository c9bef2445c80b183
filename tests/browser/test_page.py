"""The chat page in a real browser, against real servers with the tiny model, as visitors use it."""

import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import axe_playwright_python
import httpx
import pytest
from browser.chat_page import PATIENCE, PICTURES, Chat, DemoProcess
from PIL import Image
from playwright.sync_api import Page, expect
from serving.process import ServerProcess
from serving.simple_engine import BREAKS, SLOW

from qwenvl_jax.processing.boxes import parse

pytestmark = pytest.mark.browser

WORD, NUMBER, TILES = PICTURES / "word.png", PICTURES / "number.png", PICTURES / "tiles.png"
WHERE = "Where is the yellow cross?"
CAPTION = "What is in the picture?"
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def simple() -> Iterator[ServerProcess]:
    """A server that answers one request after another, slowly or not at all when it is asked to, and has few places."""
    with ServerProcess("--max-queue", "1", "--max-model-len", "256") as process:
        yield process


@pytest.fixture(scope="module")
def simple_demo(simple) -> Iterator[DemoProcess]:
    with DemoProcess("--api-base", f"{simple.url}/v1") as process:
        yield process


@pytest.fixture
def simple_chat(page, simple_demo) -> Chat:
    return Chat(page, simple_demo.address)


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


def test_settings_are_checked_where_they_stand(chat):
    notice = chat.page.locator("#settings-notice")
    chat.setting("temperature").fill("hot")
    chat.add(WORD)
    chat.send(WHERE)
    expect(notice).to_contain_text("'hot' is no number")
    expect(chat.field).to_have_value(WHERE)
    chat.setting("temperature").fill("-1")
    chat.field.press("Enter")
    expect(notice).to_contain_text("temperature", timeout=PATIENCE)
    chat.setting("temperature").fill("")
    chat.setting("schema").fill("{")
    chat.field.press("Enter")
    expect(notice).to_contain_text("The schema is no JSON object")
    chat.setting("schema").fill(
        '{"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, '
        '"required": ["n"], "additionalProperties": false}'
    )
    chat.setting("max_tokens").fill("40")
    chat.field.press("Enter")
    chat.wait(1)
    assert set(json.loads(chat.reply)) == {"n"}
    chat.page.locator("#reset").click()
    expect(chat.setting("schema")).to_have_value("")
    expect(chat.setting("temperature")).to_have_attribute("placeholder", re.compile("model: "))


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


def test_a_box_drawn_with_the_mouse_becomes_part_of_the_question(chat):
    chat.ask(WHERE, WORD)
    with Image.open(WORD) as picture:
        size = picture.size
    chat.page.get_by_role("button", name="Draw a box to ask about it").click()
    shown = chat.page.locator("#view svg").first.bounding_box()
    corners = [(298, 76), (374, 152)]
    (x1, y1), (x2, y2) = [
        (shown["x"] + x / size[0] * shown["width"], shown["y"] + y / size[1] * shown["height"]) for x, y in corners
    ]
    mouse = chat.page.mouse
    mouse.move(x1, y1)
    mouse.down()
    mouse.move((x1 + x2) / 2, y2)
    mouse.move(x2, y2)
    mouse.up()
    expect(chat.field).to_have_value(re.compile(r"What is in <box>\(\d+,\d+\),\(\d+,\d+\)</box>\?"))
    numbers = [int(number) for number in re.findall(r"\d+", chat.field.input_value())]
    wanted = [298 / size[0], 76 / size[1], 374 / size[0], 152 / size[1]]
    assert all(abs(number - 1000 * share) <= 6 for number, share in zip(numbers, wanted, strict=True))
    chat.field.press("Enter")
    chat.wait(2)
    assert chat.reply == "a yellow cross"


def test_the_code_of_a_request_runs(chat, tmp_path):
    """In a folder with the picture, and with text that a shell would read."""
    chat.setting("system").fill('You are "helpful" $HOME `id` \\n')
    chat.setting("top_k").fill("5")
    reply = chat.ask(WHERE, WORD)
    chat.page.locator("#code > button").click()
    (tmp_path / "word.png").write_bytes(WORD.read_bytes())
    curl = chat.page.locator("#code-curl textarea").input_value()
    done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    assert text.startswith("<ref>yellow cross</ref><box>"), done.stdout
    (tmp_path / "ask.py").write_text(chat.page.locator("#code-python textarea").input_value(), encoding="utf-8")
    done = subprocess.run([sys.executable, "ask.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == text, done.stderr
    assert reply == "yellow cross [1]"


def test_a_picture_by_its_address(chat):
    """A refused one: what a web address may lead to is tested in tests/processing."""
    chat.page.locator("#more > button").click()
    address = chat.page.locator("#address textarea, #address input").first
    for text in ("file:///etc/passwd", "http://127.0.0.1/word.png", "word.png"):
        address.fill(text)
        chat.page.locator("#add-address").click()
        expect(chat.page.locator("#address-notice")).to_contain_text(
            re.compile("must begin|not allowed|refused|cannot")
        )
        address.fill("")
    expect(chat.page.locator("#field .thumbnail-item")).to_have_count(0)


DROP = """([selector, name, data, kind]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  const element = document.querySelector(selector);
  const event =
    kind === "paste"
      ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
      : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  element.dispatchEvent(event);
}"""


@pytest.mark.parametrize(("kind", "selector"), [("paste", "#field textarea"), ("drop", "#field .full-container")])
def test_a_picture_is_pasted_or_dropped_into_the_question(chat, kind, selector):
    data = base64.b64encode(WORD.read_bytes()).decode()
    chat.page.evaluate(DROP, [selector, "word.png", data, kind])
    expect(chat.page.locator("#field .thumbnail-item")).to_have_count(1)
    assert chat.ask(WHERE) == "yellow cross [1]"


def test_a_photo_is_taken_with_the_camera(chat):
    """The browser's own false camera."""
    chat.page.context.grant_permissions(["camera"])
    chat.page.locator("#more > button").click()
    chat.page.locator("#camera").get_by_text("Click to Access Webcam").click()
    chat.page.locator("#camera").get_by_label("Capture photo").click()
    expect(chat.page.locator("#camera img")).to_be_visible()
    chat.page.locator("#add-camera").click()
    expect(chat.page.locator("#field .thumbnail-item")).to_have_count(1)
    assert chat.ask("Describe the picture.")


def test_the_page_names_no_file_of_the_machine_and_opens_none(demo):
    folder = Path(__file__).parents[2]
    for path in ("/etc/passwd", str(folder / "README.md"), f"{folder}/qwenvl_jax/demo/page.py", "../README.md"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            reply = httpx.get(demo.address + route + path)
            assert reply.status_code in (403, 404), (route, path, reply.status_code)
    upload = httpx.post(f"{demo.address}/gradio_api/upload", files={"files": ("../../evil.png", b"x")})
    assert all("/../" not in path for path in upload.json()), upload.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_chat, scheme):
    chat = open_chat(color_scheme=scheme)
    assert serious_faults(chat.page) == []
    chat.ask(WHERE, WORD)
    for name in ("#settings", "#code", "#more"):
        chat.page.locator(f"{name} > button").click()
    chat.page.wait_for_timeout(500)  # folds open
    assert serious_faults(chat.page) == []


def serious_faults(page: Page) -> list[str]:
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{fault['id']}: {fault['nodes'][0]['html'][:200]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


def test_nothing_is_fetched_from_elsewhere(new_page, demo):
    """The fixture lets nothing out; nothing may even try."""
    page = new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    Chat(page, demo.address).ask("Hello")
    assert [url for url in asked if not url.startswith((demo.address, "data:", "blob:"))] == []


def test_its_own_server(new_page):
    """The default: the page is there before the model, says so, then answers; SIGTERM ends both with status 0."""
    with DemoProcess("--cpu-only") as demo:
        page = new_page()
        page.goto(demo.address)
        expect(page.locator("#ready")).to_contain_text("loading the model")
        page.locator("#field textarea").fill("Hello")
        page.locator("#field textarea").press("Enter")
        expect(page.locator("#notice")).to_contain_text("still being loaded")
        expect(page.locator("#ready")).to_contain_text("tiny is ready", timeout=10 * PATIENCE)
        chat = Chat(page, demo.address)
        assert chat.ask(WHERE, WORD) == "yellow cross [1]"
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(30) == 0


def test_a_model_that_is_not_there_ends_the_demo_with_a_line(tmp_path):
    with DemoProcess("--checkpoint", str(tmp_path)) as demo:
        assert demo.process.wait(60) == 2
        line = demo.line("^demo: ")
    assert str(tmp_path) in line.string
