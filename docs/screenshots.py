"""Takes the pictures of the chat page in README and docs: `make screenshots`.

Starts `demo.py` with the tiny model, drives the page with the system's Chromium as a visitor would, and writes
docs/images/demo*.png and tutorial-*.png. What the pictures show is what the page showed.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

REPOSITORY = Path(__file__).parents[1]
IMAGES = REPOSITORY / "docs" / "images"
PICTURES = REPOSITORY / "qwenvl_jax" / "assets" / "pictures"
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SECONDS_TO_LOAD = 600  # the model, with nothing in the compilation cache, on a busy machine
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def main() -> int:
    chromium = shutil.which("chromium")
    if chromium is None:
        print("screenshots: no chromium on the PATH; install it (apt-get install chromium)", file=sys.stderr)
        return 2
    command = [sys.executable, "-u", str(REPOSITORY / "demo.py"), "--cpu-only", "--server-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        address = next(
            found[0] for line in demo.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+(?=/?$)", line.strip()))
        )
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
            for name, take in PAGES.items():
                take(Visitor(browser, address), IMAGES / f"{name}.png")
                print(f"docs/images/{name}.png")
        demo.terminate()
    return 0


class Visitor:
    """Opens pages and asks questions on them."""

    def __init__(self, browser: Browser, address: str):
        self._browser = browser
        self._address = address

    def open(self, path: str = "/", **options) -> Page:
        """A page whose model is ready; options: of Playwright's context."""
        page = self._browser.new_page(**({"viewport": DESKTOP} | options))
        page.set_default_timeout(SECONDS_TO_LOAD * 1000)
        page.goto(self._address + path)
        expect(page.locator("#ready")).to_contain_text("tiny", timeout=SECONDS_TO_LOAD * 1000)
        return page

    def ask(self, page: Page, question: str, *pictures: str) -> None:
        """Sends a question and waits for the end of the reply."""
        if pictures:
            page.set_input_files("#field input[type=file]", [str(PICTURES / name) for name in pictures])
            expect(page.locator("#field .thumbnail-item")).to_have_count(len(pictures))
        replies = page.locator("#chat [data-testid=bot]")
        count = replies.count()
        page.locator("#field textarea").fill(question)
        page.locator("#field textarea").press("Enter")
        expect(replies).to_have_count(count + 1)
        expect(page.locator("#field [data-testid=submit-button]")).to_be_visible()
        page.wait_for_timeout(500)  # pictures fade in


def conversation(
    *turns: tuple[str, ...], path: str = "/", element: str | None = None, **options
) -> Callable[[Visitor, Path], None]:
    """Takes a picture after these turns, each a question and its pictures: of one element, or of what is seen."""

    def take(visitor: Visitor, file: Path) -> None:
        page = visitor.open(path, **options)
        for question, *pictures in turns:
            visitor.ask(page, question, *pictures)
        page.evaluate("scrollTo(0, 0)")
        (page.locator(element) if element else page).screenshot(path=file)
        page.close()

    return take


def drawn_box(visitor: Visitor, file: Path) -> None:
    """A box drawn with the mouse, and the question that it begins."""
    page = visitor.open()
    visitor.ask(page, "What word is written?", "word.png")
    page.get_by_role("button", name="Draw a box to ask about it").click()
    shown = page.locator("#view svg").first.bounding_box()
    assert shown is not None
    corners = ((0.73, 0.19), (0.95, 0.42))
    (x1, y1), (x2, y2) = ((shown["x"] + x * shown["width"], shown["y"] + y * shown["height"]) for x, y in corners)
    page.mouse.move(x1, y1)
    page.mouse.down()
    page.mouse.move(x2, y2, steps=5)
    page.mouse.up()
    expect(page.locator("#field textarea")).to_have_value(re.compile("<box>"))
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=file)
    page.close()


TWO_PLACES = (("Where is the yellow cross?", "word.png"), ("Where is the purple star?",))
PAGES: dict[str, Callable[[Visitor, Path], None]] = {
    "demo": conversation(*TWO_PLACES),
    "demo-dark": conversation(color_scheme="dark"),
    "demo-phone": conversation(
        ("黄色十字形是什么颜色？", "word.png"),
        path="/zh", viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2,
    ),
    "demo-boxes": conversation(("Where is the red diamond?", "number.png"), element="#view"),
    "demo-draw": drawn_box,
    "tutorial-rounds": conversation(
        ("What word is written?", "word.png"), ("What color is the triangle?",), ("How many objects are there?",),
        element="#chat",
    ),
    "tutorial-text": conversation(
        ("What number is written in the picture?", "number.png"), ("How many diamonds are there?",), element="#chat"
    ),
    "tutorial-pictures": conversation(
        ("What is written in Picture 2?", "word.png", "number.png"), ("What is written in Picture 1?",), element="#chat"
    ),
    "tutorial-chinese": conversation(("图中有什么？", "word.png"), path="/zh", element="#chat"),
    "tutorial-grounding": conversation(
        ("How many triangles are there?", "tiles.png"),
        ("Is the blue circle left or right of the blue diamond?",),
        ("Where is the large blue diamond?",),
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
