"""The picture with boxes for everyone: accessibility, schemes, phones, Chinese; and what several of them share."""

import re
from urllib.parse import urlsplit

import pytest
from browser.accessibility import serious_faults
from browser.view import CAR, FLOWER, SIZES, TREE, UNNAMED, View, open_view
from playwright.sync_api import expect

from qwenvl_jax.demo.box_view import BOX_TEXTS
from qwenvl_jax.processing.boxes import COLOURS

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everyone_can_use_it(page, address, value, theme, width):
    page.set_viewport_size({"width": width, "height": 844})
    view = open_view(page, address, theme=theme)
    assert serious_faults(view.page, "#view-en", "#view-zh") == []
    view.show(value(CAR, FLOWER, UNNAMED, count=2))
    assert serious_faults(view.page, "#view-en", "#view-zh") == []
    view.part("draw").click()
    view.drag(SIZES["street.png"], 100, 60, 300, 200)
    view.page.keyboard.press("ArrowLeft")
    expect(view.part("status")).not_to_be_empty()
    assert serious_faults(view.page, "#view-en", "#view-zh") == []
    view.part("rows").locator("tr").first.hover()
    assert serious_faults(view.page, "#view-en", "#view-zh") == []


def test_dark_pages_have_light_letters(page, address, value):
    for theme, low, high in [("light", 0, 100), ("dark", 180, 255)]:
        view = open_view(page, address, theme=theme)
        view.show(value(CAR))
        colour = view.part("caption").evaluate("node => getComputedStyle(node).color")
        assert all(low <= int(part) <= high for part in re.findall(r"\d+", colour)[:3]), (theme, colour)


def test_a_phone_shows_it_without_scrolling_sideways(view, value):
    view.page.set_viewport_size({"width": 390, "height": 844})
    view.show(value({**CAR, "label": "a" * 150}, TREE))
    assert view.page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert view.part("table").evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    view.show(value({**CAR, "label": "a" * 150}, TREE, count=2))  # a column more: the table scrolls, the page does not
    assert view.page.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_nothing_moves_where_it_should_not(view, value):
    view.show(value(CAR))
    for motion, seconds in [("reduce", "0s"), ("no-preference", "0.12s")]:
        view.page.emulate_media(reduced_motion=motion)
        expect(view.part("lines").locator("g").first).to_have_css("transition-duration", seconds)


def test_two_components_and_two_visitors_share_nothing(view, address, value, new_page):
    chinese, other = View(view.page, "zh"), open_view(new_page(), address)
    before = set(view.page.evaluate("Object.keys(window)"))
    view.show(value(CAR))
    view.part("draw").click()
    expect(chinese.part("noPicture")).to_be_visible()
    expect(other.part("noPicture")).to_be_visible()
    chinese.show(value(FLOWER, shown=1, count=2))
    assert [line["colour"] for line in chinese.rectangles()] == [COLOURS[0]]
    expect(chinese.part("draw")).to_have_attribute("aria-pressed", "false")
    expect(view.part("image")).to_have_attribute("alt", "Picture 1: street.png")
    expect(view.part("rows").locator("tr")).to_have_count(1)
    assert set(view.page.evaluate("Object.keys(window)")) == before


def test_it_speaks_chinese(page, address, value):
    view = open_view(page, address, "zh")
    expect(view.part("noPicture")).to_have_text(BOX_TEXTS["zh"]["no_picture"])
    view.show(value(UNNAMED, FLOWER, count=2))
    view.part("draw").click()
    assert not re.search(
        r"[A-Za-z]{2,}", re.sub(r"street\.png|garden\.jpg|flower|JSON|Shift|Esc", "", view.element.inner_text())
    )


def test_it_loads_nothing_from_outside(view, value):
    asked = []
    view.page.on("request", lambda request: asked.append(request.url))
    view.show(value(CAR, FLOWER, count=2))
    view.part("draw").click()
    assert asked
    assert {urlsplit(address).hostname for address in asked} <= {"127.0.0.1", None}  # None: data and blobs
