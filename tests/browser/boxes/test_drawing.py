"""A box that a visitor draws: with the mouse, a finger or the keys."""

import json
import re

import pytest
from browser.view import CAR, SIZES, TREE, View, open_view
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def assert_heard(view: View, image: int, corners: list[int], size: tuple[int, int], before: str = "") -> None:
    """A drawn box arrived after what was heard `before`, off by no more source pixels than lie under one on screen."""
    expect(view.heard()).not_to_have_value(before)
    heard = json.loads(view.heard().input_value())
    assert heard["image"] == image
    assert all(type(corner) is int for corner in heard["box"])
    tolerance = max(1, size[0] / view.part("image").bounding_box()["width"])
    assert heard["box"] == pytest.approx(corners, abs=tolerance)


@pytest.mark.parametrize(("image", "corners"), [(0, [100, 60, 300, 200]), (1, [250, 400, 50, 100])])
def test_a_box_drawn_with_the_mouse_arrives_in_source_pixels(view, value, image, corners):
    view.show(value(shown=image, count=2))
    size = tuple(SIZES.values())[image]
    view.drag(size, *corners)
    expect(view.drawn()).to_have_count(0)  # not asked for yet
    view.part("draw").click()
    expect(view.part("draw")).to_have_attribute("aria-pressed", "true")
    expect(view.part("stage")).to_have_css("cursor", "crosshair")
    expect(view.part("stage")).to_have_css("touch-action", "none")
    view.drag(size, *corners)
    x1, x2 = sorted(corners[0::2])
    y1, y2 = sorted(corners[1::2])
    assert_heard(view, image, [x1, y1, x2, y2], size)
    expect(view.drawn().locator(".box-line")).to_have_attribute("stroke-dasharray", "6 4")
    assert [plate["text"] for plate in view.plates()] == ["?"]
    expect(view.part("status")).to_contain_text("Box chosen")


def test_a_box_drawn_over_the_edge_ends_there(view, value):
    view.show(value())
    view.part("draw").click()
    view.drag(SIZES["street.png"], 600, 440, 700, 500)
    assert_heard(view, 0, [600, 440, 640, 480], SIZES["street.png"])


def test_the_drawn_box_stays_until_the_boxes_change_or_escape(view, value):
    view.show(value(CAR))
    view.part("draw").click()
    view.drag(SIZES["street.png"], 100, 60, 300, 200)
    expect(view.drawn()).to_have_count(1)
    view.show(value(CAR))
    expect(view.drawn()).to_have_count(1)
    view.show(value(CAR, TREE))
    expect(view.drawn()).to_have_count(0)
    expect(view.part("status")).to_be_empty()
    before = view.heard().input_value()
    view.drag(SIZES["street.png"], 200, 60, 400, 200)
    view.drag(SIZES["street.png"], 220, 80, 500, 300)  # anew
    expect(view.drawn()).to_have_count(1)
    expect(view.heard()).to_have_value(re.compile(r"\[2[12]\d, "))
    assert_heard(view, 0, [220, 80, 500, 300], SIZES["street.png"], before)
    view.page.keyboard.press("Escape")
    expect(view.drawn()).to_have_count(0)
    view.page.keyboard.press("Escape")
    expect(view.part("draw")).to_have_attribute("aria-pressed", "false")
    expect(view.part("draw")).to_be_focused()


def test_slips_and_escape_draw_nothing(view, value):
    view.show(value())
    view.part("draw").click()
    x, y = view.on_screen(SIZES["street.png"], 100, 100)
    view.page.mouse.move(x, y)
    view.page.mouse.down()
    view.page.mouse.move(x + 2, y + 80)
    view.page.mouse.up()
    expect(view.drawn()).to_have_count(0)
    view.page.mouse.move(x, y)
    view.page.mouse.down()
    view.page.mouse.move(x + 80, y + 80)
    expect(view.drawn()).to_have_count(1)
    view.page.keyboard.press("Escape")
    expect(view.drawn()).to_have_count(0)
    view.page.mouse.move(x + 90, y + 90)
    view.page.mouse.up()
    view.page.wait_for_timeout(300)
    expect(view.drawn()).to_have_count(0)
    expect(view.heard()).to_have_value("")


def test_a_finger_draws(new_page, address, value):
    page = new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    view = open_view(page, address)
    view.show(value())
    view.part("draw").tap()
    view.part("stage").scroll_into_view_if_needed()
    fingers = page.context.new_cdp_session(page)
    corners = [(100, 60), (200, 130), (300, 200)]
    for kind, point in zip(("touchStart", "touchMove", "touchMove"), corners, strict=True):
        x, y = view.on_screen(SIZES["street.png"], *point)
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert_heard(view, 0, [100, 60, 300, 200], SIZES["street.png"])


def test_a_box_is_drawn_with_the_keys(view, value):
    view.show(value())
    view.part("draw").focus()
    press, status = view.page.keyboard.press, view.part("status")
    press("Space")
    expect(view.part("stage")).to_be_focused()
    press("ArrowLeft")  # from the middle, 320, 240; a step is a 200th of 640
    expect(status).to_have_text("317, 240")
    press("Shift+ArrowUp")
    expect(status).to_have_text("317, 210")
    expect(view.part("draft").locator(".box-hair")).to_have_count(2)
    press("Enter")
    expect(status).to_contain_text("First corner at 317, 210.")
    press("Enter")
    expect(status).to_have_text("That box is too small.")
    press("Shift+ArrowLeft")
    press("ArrowDown")
    expect(view.drawn()).to_have_count(1)
    press("Enter")
    expect(status).to_have_text("Box chosen: left 287, top 210, right 317, bottom 213.")
    expect(view.heard()).to_have_value('{"image": 0, "box": [287, 210, 317, 213]}')
    for _ in range(15):
        press("Shift+ArrowRight")
    expect(status).to_have_text("640, 213")
    expect(status).to_have_attribute("role", "status")
