"""What is saved: the picture with its boxes, and the boxes as JSON; labels are text wherever they go."""

import json
import re

import pytest
from browser.view import CAR, FLOWER, GREY, SECOND_CAR, SIZES, TREE, UNNAMED
from PIL import Image
from playwright.sync_api import expect

from qwenvl_jax.processing.boxes import COLOURS

pytestmark = pytest.mark.browser


HOSTILE = '<img src=x onerror="window.stolen = true">'


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
