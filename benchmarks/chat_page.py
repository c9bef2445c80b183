"""How fast the chat page is there and answers: `python benchmarks/chat_page.py [--rounds 10]`.

`demo.py` with the tiny model, its own server warm, in the system's Chromium without a screen. A round is a visitor who
has never been here: first paint (the browser's own figure), the moment at which a question can be written, and from
Send with a picture of its own to the first letter of the reply on the page, with all that lies between: the upload's
check, the request, the model, Gradio, the drawing. Each round's picture has other pixels, so that nothing is cached.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
PICTURE = REPOSITORY / "qwenvl_jax" / "assets" / "pictures" / "word.png"
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SECONDS_TO_LOAD = 600
FIGURES = {"first paint": 2.0, "question field": None, "Send to first letter": 1.0}  # and their goals, in seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="visitors, after one that is not counted (10)")
    parser.add_argument("--chromium", default="chromium", help="the browser (chromium)")
    options = parser.parse_args()
    command = [sys.executable, "-u", str(REPOSITORY / "demo.py"), "--cpu-only", "--server-port", "0"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo,
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
    ):
        assert demo.stdout is not None
        address = next(found[0] for line in demo.stdout if (found := re.search(r"http://127.*:\d+(?=/?\n)", line)))
        path = shutil.which(options.chromium) or options.chromium
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        rounds = [visit(browser, address, picture(Path(folder), number)) for number in range(options.rounds + 1)][1:]
        demo.terminate()
    console = Console()
    console.print(machine(["jax", "gradio", "playwright"]))
    table = Table("", "median, s", "spread", "goal", title=f"{options.rounds} visitors, one after another")
    for name, goal in FIGURES.items():
        found = [figures[name] for figures in rounds]
        spread = f"{min(found):.2f} to {max(found):.2f}"
        table.add_row(name, f"{statistics.median(found):.2f}", spread, "" if goal is None else f"under {goal:g}")
    console.print(table)
    return 0


def picture(folder: Path, number: int) -> Path:
    """The example picture with a corner of noise."""
    with Image.open(PICTURE) as opened:
        pixels = np.asarray(opened.convert("RGB")).copy()
    pixels[:8, :8] = np.random.default_rng(number).integers(256, size=(8, 8, 3))
    path = folder / f"{number}.png"
    Image.fromarray(pixels).save(path)
    return path


def visit(browser: Browser, address: str, path: Path) -> dict[str, float]:
    """One visitor's figures, in seconds."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS_TO_LOAD * 1000)
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("#field textarea")
    field = time.perf_counter() - began
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    expect(page.locator("#ready")).to_contain_text("tiny", timeout=SECONDS_TO_LOAD * 1000)
    page.set_input_files("#field input[type=file]", str(path))
    page.wait_for_selector("#field .thumbnail-item")
    page.fill("#field textarea", "What is in the picture?")
    page.evaluate(
        """() => {
          const chat = document.querySelector("#chat");
          new MutationObserver((_, observer) => {
            if (!chat.querySelector("[data-testid=bot]")?.innerText.trim()) return;
            window.replied = performance.now();
            observer.disconnect();
          }).observe(chat, { childList: true, subtree: true, characterData: true });
          document.addEventListener("keydown", () => (window.sent = performance.now()), { once: true, capture: true });
        }"""
    )
    page.press("#field textarea", "Enter")
    page.wait_for_function("window.replied")
    first = page.evaluate("window.replied - window.sent")
    context.close()
    return {"first paint": paint / 1000, "question field": field, "Send to first letter": first / 1000}


if __name__ == "__main__":
    sys.exit(main())
