"""The chat page as tests use it: the process that shows it, and what a visitor does on it."""

import re
from pathlib import Path

from playwright.sync_api import Locator, Page, expect
from processes import REPOSITORY, Process

PICTURES = REPOSITORY / "qwenvl_jax" / "assets" / "pictures"
WORD, NUMBER, TILES = PICTURES / "word.png", PICTURES / "number.png", PICTURES / "tiles.png"
WHERE = "Where is the yellow cross?"
CAPTION = "What is in the picture?"
PATIENCE = 30_000  # milliseconds for a reply


class DemoProcess(Process):
    """`demo.py` with the page on a free port."""

    def __init__(self, *options: str, env: dict[str, str] | None = None):
        super().__init__(REPOSITORY / "demo.py", "--server-port", "0", *options, env=env)

    def started(self) -> None:
        self.address = self.line(r"(http://127.0.0.1:\d+)/?$")[1]


class Chat:
    """A visitor's page."""

    def __init__(self, page: Page, address: str, path: str = "/"):
        self.page = page
        page.goto(address + path)
        self.field = page.locator("#field textarea")
        self.notice = page.locator("#notice")
        self.status = page.locator("#status")
        expect(page.locator("#ready")).to_contain_text(re.compile("tiny"), timeout=PATIENCE)

    def add(self, *pictures: str | Path) -> None:
        """Uploads pictures into the question field."""
        before = self.page.locator("#field .thumbnail-item").count()
        self.page.set_input_files("#field input[type=file]", [str(picture) for picture in pictures])
        expect(self.page.locator("#field .thumbnail-item")).to_have_count(before + len(pictures), timeout=PATIENCE)

    def send(self, question: str) -> None:
        """Writes a question and presses Enter."""
        self.field.fill(question)
        self.field.press("Enter")

    def ask(self, question: str, *pictures: str | Path) -> str:
        """Asks and waits for the end of the reply. Returns it as the page shows it."""
        if pictures:
            self.add(*pictures)
        count = self.replies.count()
        self.send(question)
        self.wait(count + 1)
        return self.reply

    def again(self) -> None:
        """Regenerates the last reply and waits for its end, which the request's id tells."""
        before = self.status.inner_text().strip()
        self.page.get_by_label("Retry").click()
        expect(self.status).not_to_have_text(before)
        expect(self.status).to_contain_text("request")

    def wait(self, count: int) -> None:
        """Until there are so many replies and the last is complete."""
        expect(self.replies).to_have_count(count, timeout=PATIENCE)
        expect(self.page.locator("#field [data-testid=submit-button]")).to_be_visible(timeout=PATIENCE)

    @property
    def replies(self) -> Locator:
        return self.page.locator("#chat [data-testid=bot]")

    @property
    def questions(self) -> Locator:
        return self.page.locator("#chat [data-testid=user]")

    @property
    def reply(self) -> str:
        """The last reply, once it stays as it is: its bubble is drawn a moment after the rest of the page."""
        text, before = self.replies.last.inner_text(), None
        while text != before:
            self.page.wait_for_timeout(100)
            before, text = text, self.replies.last.inner_text()
        return text.strip()

    @property
    def boxes(self) -> Locator:
        """The rows of the table of boxes."""
        return self.page.locator("#view tbody tr")

    def setting(self, name: str) -> Locator:
        """The input of a setting; opens the settings."""
        found = self.page.locator(f"#setting-{name}").locator("input, textarea").first
        if not found.is_visible():
            self.page.locator("#settings > button").click()
        return found
