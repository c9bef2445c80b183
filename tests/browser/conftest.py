"""A real browser for tests of pages: Debian's Chromium, driven by Playwright.

`page` is a fresh visitor: no cookie or storage of another test. Nothing outside this machine is reached.
"""

import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

PATIENCE = 30_000  # milliseconds; a busy machine takes its time
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the PATH")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser) -> Iterator[Callable[..., Page]]:
    """Makes a page of a visitor of its own; takes Playwright's options of a context, such as `viewport`."""
    contexts = []

    def make(**options) -> Page:
        context = browser.new_context(accept_downloads=True, **options)
        context.set_default_timeout(PATIENCE)
        context.route("**/*", _only_this_machine)
        contexts.append(context)
        return context.new_page()

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page) -> Page:
    return new_page(viewport={"width": 1280, "height": 900})


def _only_this_machine(route: Route) -> None:
    if urlsplit(route.request.url).hostname in {"127.0.0.1", None}:  # None: data and blobs
        route.continue_()
    else:
        route.abort()
