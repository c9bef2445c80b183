"""The picture with boxes as a visitor meets it: a small page streams values into it, a real browser shows it."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import axe_playwright_python
import pytest
from browser import box_view_app
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, expect

from qwenvl_jax.demo.box_view import BOX_TEXTS
from qwenvl_jax.processing.boxes import COLOURS

pytestmark = pytest.mark.browser

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
GREY = (120, 120, 120)
SIZES = {"street.png": (640, 480), "garden.jpg": (300, 500)}
CAR = {"image": 0, "label": "red car", "x1": 64, "y1": 96, "x2": 256, "y2": 288}
TREE = {"image": 0, "label": "a tree", "x1": 320, "y1": 48, "x2": 608, "y2": 432}
SECOND_CAR = {"image": 0, "label": "red car", "x1": 0, "y1": 400, "x2": 640, "y2": 480}
UNNAMED = {"image": 0, "label": None, "x1": 400, "y1": 100, "x2": 500, "y2": 200}
FLOWER = {"image": 1, "label": "flower", "x1": 30, "y1": 50, "x2": 150, "y2": 250}
HOSTILE = '<img src=x onerror="window.stolen = true">'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[dict]:
    """Two grey pictures as the component's value names them."""
    folder = tmp_path_factory.mktemp("pictures")
    named = []
    for name, size in SIZES.items():
        Image.new("RGB", size, GREY).save(folder / name)
        named.append({"url": f"/gradio_api/file={folder / name}", "name": name, "width": size[0], "height": size[1]})
    return named


@pytest.fixture(scope="module")
def address(pictures) -> Iterator[str]:
    folder = Path(pictures[0]["url"].partition("=")[2]).parent
    page, address = box_view_app.launch(folder)
    yield address
    page.close()


@pytest.fixture(scope="module")
def visitor(browser) -> Iterator[BrowserContext]:
    """The same for most tests, so that the browser has Gradio's many files since the first."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def page(visitor) -> Iterator[Page]:
    page = visitor.new_page()
    yield page
    page.close()


class View:
    """One component on a page."""

    def __init__(self, page: Page, language: str = "en"):
        self.page, self.language = page, language
        self.element = page.locator(f"#view-{language}")
        self.shows = 0

    def part(self, name: str) -> Locator:
        return self.element.locator(f"[data-part={name}]")

    def show(self, *values: dict) -> None:
        """Streams the values into the component; returns when the last one is there."""
        self.shows += 1
        wanted = json.dumps({"name": str(self.shows), "values": values})
        self.page.locator(f"#wanted-{self.language}").locator("input, textarea").fill(wanted)
        self.page.locator(f"#go-{self.language}").click()
        done = self.page.locator(f"#done-{self.language}").locator("input, textarea")
        expect(done).to_have_value(str(self.shows))
        expect(self.part("rows").locator("tr")).to_have_count(len(values[-1]["boxes"]))
        if values[-1]["pictures"]:
            self.part("stage").scroll_into_view_if_needed()  # the mouse reaches no other part of the page

    def heard(self) -> Locator:
        return self.page.locator(f"#heard-{self.language}").locator("input, textarea")

    def rectangles(self) -> list[dict]:
        """Of the boxes' lines on the screen: place, colour, dash, and the number of the box."""
        return self.part("lines").evaluate(
            """lines => Array.from(lines.querySelectorAll(".box-line"), line => {
                const {left, top, right, bottom} = line.getBoundingClientRect();
                return {corners: [left, top, right, bottom], colour: line.getAttribute("stroke"),
                        dash: line.getAttribute("stroke-dasharray"), box: line.parentNode.dataset.box};
            })"""
        )

    def plates(self) -> list[dict]:
        return self.part("plates").evaluate(
            """plates => Array.from(plates.children, plate => {
                const {left, top, right, bottom} = plate.querySelector("rect").getBoundingClientRect();
                return {corners: [left, top, right, bottom], text: plate.textContent,
                        fill: plate.querySelector("rect").getAttribute("fill"),
                        ink: plate.querySelector("text").getAttribute("fill")};
            })"""
        )

    def on_screen(self, size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
        """Where a source pixel of the shown picture, whose size is given, is on the screen."""
        place = self.part("image").bounding_box()
        return place["x"] + x / size[0] * place["width"], place["y"] + y / size[1] * place["height"]

    def cells(self, row: int) -> list[str]:
        return self.part("rows").locator("tr").nth(row).locator("th, td").all_inner_texts()

    def drag(self, size: tuple[int, int], *corners: int) -> None:
        self.part("stage").scroll_into_view_if_needed()
        mouse = self.page.mouse
        mouse.move(*self.on_screen(size, *corners[:2]))
        mouse.down()
        mouse.move(*self.on_screen(size, (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2))
        mouse.move(*self.on_screen(size, *corners[2:]))
        mouse.up()

    def drawn(self) -> Locator:
        return self.part("draft").locator("g:not(.box-hair)")


def open_view(page: Page, address: str, language: str = "en", theme: str = "light") -> View:
    page.goto(f"{address}?__theme={theme}")
    view = View(page, language)
    expect(view.part("noPicture")).to_be_visible()
    return view


@pytest.fixture
def view(page, address) -> View:
    return open_view(page, address)


@pytest.fixture
def value(pictures) -> Callable[..., dict]:
    """A value with these boxes, on the first `count` pictures."""

    def make(*boxes: dict, shown: int | None = 0, count: int = 1) -> dict:
        return {"pictures": pictures[:count], "shown": shown, "boxes": list(boxes)}

    return make


def contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_words_stand_where_there_is_nothing_to_see(view, value):
    expect(view.part("noPicture")).to_have_text("Pictures and their boxes appear here.")
    expect(view.part("body")).to_be_hidden()
    view.show(value())
    expect(view.part("noPicture")).to_be_hidden()
    expect(view.part("noBoxes")).to_be_visible()
    expect(view.part("table")).to_be_hidden()
    for save in ("savePicture", "saveJson"):
        expect(view.part(save)).to_be_disabled()
    view.show(value(CAR))
    expect(view.part("noBoxes")).to_be_hidden()
    view.show({"pictures": [], "shown": None, "boxes": []})
    expect(view.part("noPicture")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("shown", [0, 1])
def test_boxes_lie_on_their_pixels(view, value, width, shown):
    view.page.set_viewport_size({"width": width, "height": 800})
    boxes = [CAR, TREE, SECOND_CAR] if shown == 0 else [FLOWER]
    view.show(value(*boxes, shown=shown, count=2))
    place = view.part("image").bounding_box()
    size = tuple(SIZES.values())[shown]
    assert place["width"] / place["height"] == pytest.approx(size[0] / size[1], rel=0.01)
    assert place["height"] <= 0.6 * 800 + 1
    assert place["width"] > 150
    for box, rectangle in zip(boxes, view.rectangles(), strict=True):
        wanted = [*view.on_screen(size, box["x1"], box["y1"]), *view.on_screen(size, box["x2"], box["y2"])]
        assert rectangle["corners"] == pytest.approx(wanted, abs=1)


def test_lines_follow_the_size_of_the_window(view, value):
    view.show(value(CAR))
    before = view.plates()[0]["corners"]
    view.page.set_viewport_size({"width": 700, "height": 800})
    expect(view.part("image")).not_to_have_css("width", "0px")
    view.page.wait_for_timeout(200)
    after = view.plates()[0]["corners"]
    assert after[3] - after[1] == pytest.approx(before[3] - before[1], abs=0.5)  # letters keep their size
    left, top = view.on_screen(SIZES["street.png"], CAR["x1"], CAR["y1"])
    assert (after[0], after[3]) == pytest.approx((left, top), abs=1)


def test_a_box_without_extent_or_outside_the_picture_is_still_seen(view, value):
    view.show(value({**CAR, "x2": CAR["x1"]}, {**CAR, "x1": -50, "x2": 9999}))
    for rectangle, (x1, x2) in zip(view.rectangles(), [(64, 64), (0, 640)], strict=True):
        wanted = [view.on_screen(SIZES["street.png"], x, 0)[0] for x in (x1, x2)]
        assert rectangle["corners"][0::2] == pytest.approx(wanted, abs=1)
    assert len(view.plates()) == 2


def test_boxes_grow_while_the_picture_stays(view, value):
    view.show(value())
    view.page.evaluate(
        """() => {
            const part = name => document.querySelector(`#view-en [data-part=${name}]`);
            window.seen = {image: part("image"), loads: 0, counts: [], changes: 0};
            part("image").addEventListener("load", () => window.seen.loads++);
            new MutationObserver(() => window.seen.counts.push(part("rows").children.length))
                .observe(part("rows"), {childList: true});
            new MutationObserver(changes => window.seen.changes += changes.length)
                .observe(part("stage"), {childList: true});
        }"""
    )
    boxes = [CAR, TREE, SECOND_CAR, UNNAMED]
    view.show(*(value(*boxes[:count]) for count in range(1, 5)))
    seen = view.page.evaluate(
        """() => ({...window.seen, image: window.seen.image === document.querySelector("#view-en [data-part=image]"),
                   alive: window.seen.image.isConnected})"""
    )
    assert seen == {"image": True, "alive": True, "loads": 0, "counts": [1, 2, 3, 4], "changes": 0}
    assert [rectangle["box"] for rectangle in view.rectangles()] == ["1", "2", "3", "4"]


def test_boxes_of_a_label_look_alike_and_others_do_not(view, value):
    view.show(value(CAR, TREE, SECOND_CAR, UNNAMED, UNNAMED))
    styles = [(line["colour"], line["dash"]) for line in view.rectangles()]
    assert styles[0] == styles[2] == (COLOURS[0], "none")
    different = [styles[0], styles[1], styles[3], styles[4]]
    assert len({colour for colour, _ in different}) == len({dash for _, dash in different}) == 4
    assert [plate["text"] for plate in view.plates()] == ["1 red car", "2 a tree", "3 red car", "4", "5"]
    swatches = view.part("rows").locator(".box-swatch line:last-child")
    shown = [(line.get_attribute("stroke"), line.get_attribute("stroke-dasharray")) for line in swatches.all()]
    assert shown == styles


def test_every_plate_can_be_read_and_no_two_of_many_labels_look_alike(view, value):
    view.show(value(*({**CAR, "label": f"label {number}"} for number in range(60))))
    assert len({(line["colour"], line["dash"]) for line in view.rectangles()}) == 60
    plates = view.plates()
    assert {plate["fill"] for plate in plates} == set(COLOURS)
    assert min(contrast(plate["fill"], plate["ink"]) for plate in plates) >= 4.5


def test_plates_stay_within_the_picture_and_off_each_other(view, value):
    long = {**CAR, "label": "a label that is far longer than the picture is wide " * 3, "x1": 600, "x2": 640, "y1": 0}
    view.show(value(CAR, {**CAR, "label": "the same"}, {**CAR, "label": "and again"}, long, SECOND_CAR))
    place = view.part("image").bounding_box()
    right, bottom = place["x"] + place["width"], place["y"] + place["height"]
    plates = [plate["corners"] for plate in view.plates()]
    assert view.plates()[3]["text"].endswith("…")
    for x1, y1, x2, y2 in plates:
        assert place["x"] - 1 <= x1 < x2 <= right + 1
        assert place["y"] - 1 <= y1 < y2 <= bottom + 1
    for one, other in itertools.combinations(plates, 2):
        apart = [one[2] - other[0], other[2] - one[0], one[3] - other[1], other[3] - one[1]]
        assert min(apart) < 0.5, (one, other)


def test_of_several_pictures_one_is_shown_with_its_boxes(view, value, pictures):
    view.show(value(CAR, FLOWER, shown=0, count=2))
    first, second = view.part("pictures").locator("button").all()
    expect(first).to_have_accessible_name("Picture 1: street.png")
    expect(second).to_have_accessible_name("Picture 2: garden.jpg")
    expect(second).to_have_attribute("aria-pressed", "true")  # the last box that came lies there
    assert [line["box"] for line in view.rectangles()] == ["2"]
    first.focus()
    view.page.keyboard.press("Enter")
    expect(first).to_have_attribute("aria-pressed", "true")
    expect(second).to_have_attribute("aria-pressed", "false")
    expect(view.part("image")).to_have_attribute("src", pictures[0]["url"])
    expect(view.part("image")).to_have_attribute("alt", "Picture 1: street.png")
    assert [line["box"] for line in view.rectangles()] == ["1"]


def test_the_picture_follows_the_server_and_new_boxes_but_not_each_value(view, value):
    pressed = view.part("pictures").locator("[aria-pressed=true]")
    view.show(value(shown=0, count=2))
    expect(pressed).to_have_text("Picture 1: street.png")
    view.show(value(shown=1, count=2))
    expect(pressed).to_have_text("Picture 2: garden.jpg")
    view.show(value(CAR, shown=1, count=2))
    expect(pressed).to_have_text("Picture 1: street.png")
    view.part("pictures").locator("button").nth(1).click()
    view.show(value(CAR, shown=1, count=2), value(CAR, shown=None, count=2))  # nothing new: the visitor's choice stays
    expect(pressed).to_have_text("Picture 2: garden.jpg")
    view.show(value(shown=7, count=1))  # that picture is gone
    expect(view.part("image")).to_have_attribute("alt", "Picture 1: street.png")
    expect(view.part("pictures")).to_be_hidden()


def test_another_conversation_begins_with_the_picture_that_the_server_shows(view, value, pictures):
    view.show(value(FLOWER, shown=0, count=2))
    expect(view.part("image")).to_have_attribute("alt", "Picture 2: garden.jpg")
    view.show({"pictures": pictures[::-1], "shown": 0, "boxes": []})
    expect(view.part("image")).to_have_attribute("alt", "Picture 1: garden.jpg")


def test_the_table_lists_the_boxes(view, value):
    view.show(value(CAR, UNNAMED))
    expect(view.part("table").get_by_role("columnheader")).to_have_text(
        ["Box", "Line", "Label", "Left", "Top", "Right", "Bottom"]
    )
    assert view.cells(0) == ["1", "", "red car", "64", "96", "256", "288"]
    assert view.cells(1) == ["2", "", "no label", "400", "100", "500", "200"]
    expect(view.part("table").get_by_role("rowheader")).to_have_count(2)
    expect(view.part("table").get_by_role("table")).to_have_accessible_name("Boxes of the reply, corners in pixels")
    view.show(value(CAR, FLOWER, count=2))
    assert view.cells(1) == ["2", "", "flower", "2 garden.jpg", "30", "50", "150", "250"]
    view.part("rows").get_by_role("button", name="Box 1: red car").click()
    expect(view.part("image")).to_have_attribute("alt", "Picture 1: street.png")


def test_a_row_lights_its_box(view, value):
    view.show(value(CAR, TREE))
    lit = view.element.locator("[data-part=lines] .box-lit, [data-part=plates] .box-lit")
    view.part("rows").locator("tr").nth(1).hover()
    expect(lit).to_have_count(2)
    assert lit.evaluate_all("nodes => nodes.map(node => node.dataset.box)") == ["2", "2"]
    expect(view.part("lines").locator("g").nth(1).locator(".box-line")).to_have_css("stroke-width", "5px")
    view.part("caption").hover()
    expect(lit).to_have_count(0)
    view.part("rows").get_by_role("button").nth(0).focus()
    assert lit.evaluate_all("nodes => nodes.map(node => node.dataset.box)") == ["1", "1"]


def test_a_box_lights_its_row(view, value):
    inside = {**TREE, "label": "bird", "x1": 400, "y1": 200, "x2": 500, "y2": 300}
    view.show(value(CAR, inside, TREE))
    lit = view.part("rows").locator("tr.box-lit th")
    for x, y, number in [(150, 200, "1"), (450, 250, "2"), (350, 400, "3")]:  # the smallest, whatever the order
        view.page.mouse.move(*view.on_screen(SIZES["street.png"], x, y))
        expect(lit).to_have_text(number)
    view.page.mouse.move(*view.on_screen(SIZES["street.png"], 300, 20))
    expect(lit).to_have_count(0)


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


def test_the_picture_is_saved_with_its_boxes_at_the_size_of_the_source(view, value, tmp_path):
    view.show(value(CAR, TREE, SECOND_CAR))
    with view.page.expect_download() as started:
        view.part("savePicture").click()
    assert started.value.suggested_filename == "street-boxes.png"
    started.value.save_as(tmp_path / "saved.png")
    with Image.open(tmp_path / "saved.png") as saved:
        assert saved.format == "PNG"
        assert saved.size == SIZES["street.png"]
        pixels = saved.convert("RGB")
    red, green = (tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5)) for colour in COLOURS[:2])
    for x, y in [(64, 200), (256, 200), (160, 288), (100, 96), (0, 440), (639, 440), (320, 479)]:
        assert pixels.getpixel((x, y)) == red, (x, y)
    edge = [pixels.getpixel((x, 432)) for x in range(330, 600)]
    assert green in edge
    assert (0, 0, 0) in edge  # between the dashes
    assert pixels.getpixel((20, 300)) == pixels.getpixel((160, 200)) == GREY
    plate = pixels.crop((64, 70, 130, 90)).getcolors(10_000)
    assert max(plate)[1] == red
    assert any(colour == (0, 0, 0) for _, colour in plate)  # the letters


def test_a_picture_that_cannot_be_saved_is_said_to_be(view, value):
    view.show(value(CAR))
    view.page.evaluate("() => { HTMLCanvasElement.prototype.toBlob = done => done(null) }")  # as of one too large
    view.part("savePicture").click()
    expect(view.part("status")).to_have_text("The picture could not be saved.")


def test_boxes_are_saved_as_json(view, value, tmp_path):
    view.show(value(CAR, UNNAMED, FLOWER, count=2))
    with view.page.expect_download() as started:
        view.part("saveJson").click()
    assert started.value.suggested_filename == "garden-boxes.json"
    started.value.save_as(tmp_path / "saved.json")
    street = {"picture": "street.png", "width": 640, "height": 480}
    garden = {"picture": "garden.jpg", "width": 300, "height": 500}
    assert json.loads((tmp_path / "saved.json").read_text()) == [CAR | street, UNNAMED | street, FLOWER | garden]


def test_labels_and_names_are_never_html(view, value, pictures):
    hostile = [{**picture, "name": HOSTILE} for picture in pictures]
    boxes = [{**CAR, "label": HOSTILE}, {**TREE, "label": "${alert(1)} {{value}} {name}\u202e\n\0"}]
    view.show({"pictures": hostile, "shown": 0, "boxes": boxes})
    view.part("rows").locator("tr").first.hover()
    images = view.element.locator("img")
    expect(images).to_have_count(3)  # the picture and two thumbnails
    assert view.cells(0)[2] == HOSTILE
    assert view.cells(1)[2] == "${alert(1)} {{value}} {name}"
    assert view.plates()[0]["text"].startswith("1 <img src=x")
    expect(view.part("image")).to_have_attribute("alt", f"Picture 1: {HOSTILE}")
    with view.page.expect_download() as started:
        view.part("saveJson").click()
    assert re.fullmatch(r"[^\\/:*?\"<>|]+-boxes\.json", started.value.suggested_filename)
    assert view.page.evaluate("window.stolen") is None


def serious(page: Page) -> list[str]:
    """What axe finds wrong in the components that matters."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run({include: ['#view-en', '#view-zh']}, {resultTypes: ['violations']})")
    assert len(found["passes"]) > 5  # it did look
    return [
        f"{violation['id']}: {violation['nodes'][0]['html']}"
        for violation in found["violations"]
        if violation["impact"] in {"serious", "critical"}
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everyone_can_use_it(page, address, value, theme, width):
    page.set_viewport_size({"width": width, "height": 844})
    view = open_view(page, address, theme=theme)
    assert serious(view.page) == []
    view.show(value(CAR, FLOWER, UNNAMED, count=2))
    assert serious(view.page) == []
    view.part("draw").click()
    view.drag(SIZES["street.png"], 100, 60, 300, 200)
    view.page.keyboard.press("ArrowLeft")
    expect(view.part("status")).not_to_be_empty()
    assert serious(view.page) == []
    view.part("rows").locator("tr").first.hover()
    assert serious(view.page) == []


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
