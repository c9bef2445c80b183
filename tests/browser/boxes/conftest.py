"""A small page with the picture with boxes on it, into which tests stream values."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import box_view_app
from browser.view import GREY, SIZES, View, open_view
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[dict]:
    """Two grey pictures as the component's value names them."""
    folder = tmp_path_factory.mktemp("pictures")
    named = []
    for name, size in SIZES.items():
        Image.new("RGB", size, GREY).save(folder / name)
        named.append({"url": f"/gradio_api/file={folder / name}", "name": name, "width": size[0], "height": size[1]})
    return named


@pytest.fixture(scope="session")
def address(pictures) -> Iterator[str]:
    folder = Path(pictures[0]["url"].partition("=")[2]).parent
    page, address = box_view_app.launch(folder)
    yield address
    page.close()


@pytest.fixture
def view(page, address) -> View:
    return open_view(page, address)


@pytest.fixture
def value(pictures) -> Callable[..., dict]:
    """A value with these boxes, on the first `count` pictures."""

    def make(*boxes: dict, shown: int | None = 0, count: int = 1) -> dict:
        return {"pictures": pictures[:count], "shown": shown, "boxes": list(boxes)}

    return make
