"""The chat page as tests use it: the process that shows it, and what a visitor does on it."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

REPOSITORY = Path(__file__).parents[2]
PICTURES = REPOSITORY / "qwenvl_jax" / "assets" / "pictures"
SECONDS_TO_START = 120  # on a machine that others use, too
PATIENCE = 30_000  # milliseconds for a reply


class DemoProcess:
    """`demo.py` with the page on a free port. `lines`: what it has written so far."""

    def __init__(self, *options: str, env: dict[str, str] | None = None):
        command = [sys.executable, str(REPOSITORY / "demo.py"), "--server-port", "0", *options]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {})
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.address = self.line(r"(http://127.0.0.1:\d+)/?$")[1]
        except BaseException:
            self.process.kill()  # nobody else would
            raise

    def __enter__(self) -> "DemoProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()

    def line(self, pattern: str) -> re.Match:
        """The first line that holds a pattern; waits for it."""
        end = time.monotonic() + SECONDS_TO_START
        ended = False
        while not ended and time.monotonic() < end:
            if ended := self.process.poll() is not None:
                self._reader.join()  # all that it wrote
            for line in list(self.lines):
                if found := re.search(pattern, line.rstrip()):
                    return found
            time.sleep(0.02)
        raise AssertionError(f"no line {pattern!r} in {self.lines}")

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)


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
        return self.replies.last.inner_text().strip()

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
