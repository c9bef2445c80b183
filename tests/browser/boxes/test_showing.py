"""Where boxes lie, how they look, which picture is shown, and what the table says."""

import itertools

import pytest
from browser.view import CAR, FLOWER, SECOND_CAR, SIZES, TREE, UNNAMED
from playwright.sync_api import expect

from qwenvl_jax.processing.boxes import COLOURS

pytestmark = pytest.mark.browser


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
