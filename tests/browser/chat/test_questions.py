"""What goes into a question: boxes, pictures from everywhere, settings; and the code that asks it again."""

import base64
import json
import re
import subprocess
import sys

import pytest
from browser.chat_page import PATIENCE, WHERE, WORD
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


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


def test_a_picture_by_its_address(chat):
    """A refused one: what a web address may lead to is tested in tests/processing."""
    chat.page.locator("#more > button").click()
    address = chat.page.locator("#address textarea, #address input").first
    for text, reason in (
        ("file:///etc/passwd", "must begin"),
        ("http://127.0.0.1/word.png", "not public"),
        ("word.png", "must begin"),
    ):
        address.fill(text)
        chat.page.locator("#add-address").click()
        expect(chat.page.locator("#address-notice")).to_contain_text(reason)  # never that of the one before
        address.fill("")
    expect(chat.page.locator("#field .thumbnail-item")).to_have_count(0)


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
