"""Boxes: reading replies, the inverse of reading, and drawing with glyphs that are there."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from qwenvl_jax.processing import boxes
from qwenvl_jax.processing.boxes import COLOURS, Box, draw, draw_answers, parse, render, to_pixels, to_thousandths

SIZE = (200, 100)


def test_a_reply_with_labels():
    text = "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref><box>(219,424),(576,896)</box>"
    assert parse(text, SIZE, image=2) == [Box("Woman", 90, 37, 146, 80, 2), Box("her dog", 43, 42, 115, 89, 2)]


def test_several_boxes_after_one_label_share_it():
    text = "<ref>a</ref><box>(0,0),(500,500)</box>\n <box>(1,2),(3,4)</box> then <box>(5,5),(999,999)</box>"
    assert parse(text, SIZE) == [Box("a", 0, 0, 100, 50), Box("a", 0, 0, 0, 0), Box(None, 1, 0, 199, 99)]


@pytest.mark.parametrize(
    "broken",
    [
        "<box>(1,2),(3,4)",
        "<box>(1,2),(3,4),(5,6)</box>",
        "<box>(1,2)</box>",
        "<box></box>",
        "<box>(a,b),(c,d)</box>",
        "<box>(1,2),(3,-4)</box>",
        "<box>(1,2),(3,1001)</box>",
        "<box>(1,2),(3,99999999999999999999)</box>",
        "<box>(١,2),(3,4)</box>",
        "<ref>no box</ref>",
        "<ref>open <box>",
        "</box><box></ref>",
        "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
    ],
)
def test_what_is_malformed_is_skipped_and_the_rest_is_kept(broken):
    good = "<ref>good</ref><box>(100,100),(200,200)</box>"
    assert parse(broken, SIZE) == []
    expected = Box("good", 20, 10, 40, 20)
    assert parse(f"{good} {broken}", SIZE) == [expected]
    assert parse(f"{broken} {good}", SIZE) == [expected]


def test_loose_spelling_is_read():
    assert parse("<box>( 10, 20 ) , (500.5,600)</box>", SIZE) == [Box(None, 2, 2, 100, 60)]
    assert parse("<box>(1000,1000),(0,0)</box>", SIZE) == [Box(None, 0, 0, 200, 100)]  # corners swapped


@given(st.text(alphabet="<>/refbox(),0123456789 x", max_size=80))
def test_nothing_a_model_writes_raises(text):
    for box in parse(text, SIZE):
        assert 0 <= box.x1 <= box.x2 <= SIZE[0]
        assert 0 <= box.y1 <= box.y2 <= SIZE[1]


def test_a_long_reply_of_open_tags_is_read_quickly():
    assert parse("<ref>" * 50_000 + "<box>" * 50_000, SIZE) == []


@given(st.integers(1, 1000).flatmap(lambda extent: st.tuples(st.integers(0, extent - 1), st.just(extent))))
@example((29, 100))  # 290 / 1000 * 100 is 28.999999999999996
def test_a_pixel_survives_the_text(case):
    pixel, extent = case
    number = to_thousandths(pixel, extent)
    assert 0 <= number <= 999
    assert to_pixels(number, extent) == pixel
    assert number == 0 or to_pixels(number - 1, extent) < pixel  # the smallest that does


@given(st.integers(0, 999), st.integers(1, 10_000))
def test_a_number_of_the_text_survives_fractional_pixels(number, extent):
    assert to_thousandths(number / 1000 * extent, extent) == number


def test_large_pictures_and_outer_edges():
    assert to_thousandths(4000, 4000) == 999
    assert abs(to_pixels(to_thousandths(1234, 4000), 4000) - 1234) <= 4
    assert to_thousandths(0, 7) == 0


def test_rendering():
    assert render("dog", (20, 10, 40, 20), SIZE) == "<ref>dog</ref><box>(100,100),(200,200)</box>"
    assert render(None, (0, 0, 200, 100), SIZE) == "<box>(0,0),(999,999)</box>"
    assert parse(render("dog", (13, 57, 111, 99), SIZE), SIZE) == [Box("dog", 13, 57, 111, 99)]


def colours_in(image: Image.Image) -> set[str]:
    return {"#{:02x}{:02x}{:02x}".format(*tuple(pixel)) for pixel in np.asarray(image).reshape(-1, 3)}


def test_each_label_has_its_colour_and_the_source_stays_as_it_was():
    image = Image.new("RGB", (300, 200), "#808080")
    found = [
        Box("a", 10, 60, 60, 120),
        Box("b", 80, 60, 120, 120),
        Box("a", 150, 60, 200, 120),
        Box(None, 230, 60, 280, 120),
    ]
    drawn = draw(image, found)
    assert colours_in(image) == {"#808080"}
    for box, colour in zip(found, (COLOURS[0], COLOURS[1], COLOURS[0], COLOURS[2]), strict=True):
        assert "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((box.x1, box.y1 + 20))) == colour
        assert "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((box.x2, box.y2))) == colour
    np.testing.assert_array_equal(np.asarray(draw(image, found)), np.asarray(drawn))


def test_more_boxes_than_colours():
    drawn = draw(Image.new("RGB", (400, 400)), [Box(None, 20 * i, 20 * i, 20 * i + 15, 20 * i + 15) for i in range(15)])
    assert colours_in(drawn) == {"#000000", *COLOURS}


def test_lines_grow_with_the_picture():
    widths = []
    for side in (100, 448, 2000):
        drawn = draw(Image.new("RGB", (side, side), "white"), [Box(None, 0, 0, side - 1, side - 1)])
        row = np.asarray(drawn)[side // 2, : side // 2, 1]
        widths.append(int((row < 255).sum()))
    assert widths == [1, 2, 10]


@given(
    st.tuples(st.integers(1, 120), st.integers(1, 120)),
    st.tuples(*[st.integers(-50, 200)] * 4),
    st.none() | st.text(max_size=30),
)
def test_any_box_can_be_drawn_on_any_picture(size, corners, label):
    assert draw(Image.new("RGB", size), [Box(label, *corners)]).size == size


@pytest.mark.parametrize("corner", [(0, 0), (290, 0), (0, 190), (290, 190)])
def test_the_plate_stays_inside_the_picture(corner):
    image = Image.new("RGB", (300, 200), "white")
    x, y = corner
    drawn = np.asarray(draw(image, [Box("a label", x, y, x + 9, y + 9)]))
    plate = (drawn == tuple(int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))).all(-1)
    rows, columns = np.flatnonzero(plate.any(1)), np.flatnonzero(plate.any(0))
    text_width = boxes.font(12).getlength("a label")
    assert columns[-1] - columns[0] + 1 >= text_width  # the whole plate is there, at every corner
    assert rows[-1] - rows[0] + 1 >= sum(boxes.font(12).getmetrics())


def test_two_labels_at_one_place_can_both_be_read():
    """An answer drawn beside what was expected: the boxes are nearly the same."""
    two = [Box("expected", 60, 60, 140, 140), Box("answered", 62, 61, 141, 142)]
    drawn = np.asarray(boxes.draw(Image.new("RGB", (200, 200), "black"), two))
    alone = [np.asarray(boxes.draw(Image.new("RGB", (200, 200), "black"), [box])) for box in two]
    first, second = (tuple(int(COLOURS[i][k : k + 2], 16) for k in (1, 3, 5)) for i in (0, 1))
    plates = [(drawn == colour).all(-1).sum() for colour in (first, second)]
    assert min(plates) > 0.9 * min((picture == first).all(-1).sum() for picture in alone)


def test_a_label_is_one_line_that_fits():
    text = boxes._fitting("a very long label " * 20, boxes.font(12), 116)
    assert text.endswith("…")
    assert boxes.font(12).getlength(text) <= 116
    assert boxes._fitting("line\nbreak\u0000", boxes.font(12), 1000) == "line break"


def glyph(character: str) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((2, 2), character, font=boxes.font(24), fill=255)
    return image.tobytes()


def test_the_font_has_chinese_japanese_and_western_glyphs():
    absent = glyph("\U000e0fff")  # drawn as .notdef, a box
    assert any(absent)
    characters = "击掌格子衬衫狗红圆形のカé€Ωя，。！（）Az09"
    drawn = [glyph(character) for character in characters]
    assert all(any(image) and image != absent for image in drawn)
    assert len(set(drawn)) == len(characters)


def test_the_font_covers_gb2312():
    from fontTools.ttLib import TTFont

    known = TTFont(boxes.FONT_FILE).getBestCmap()
    hanzi = [bytes([row, cell]).decode("gb2312", "ignore") for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF)]
    hanzi = [character for character in hanzi if character]
    assert len(hanzi) == 6763
    assert all(ord(character) in known for character in hanzi)
    assert boxes.FONT_FILE.stat().st_size < 3_500_000


def test_a_chinese_label_is_drawn_with_its_glyphs():
    image = Image.new("RGB", (400, 300), "white")

    def plate_of(label: str) -> np.ndarray:
        return np.asarray(draw(image, [Box(label, 100, 100, 300, 200)]))

    chinese, absent = plate_of("红色圆形"), plate_of("\U000f0000" * 4)
    assert (chinese != absent).any()
    assert (chinese != plate_of("红色方形")).any()


@pytest.mark.parametrize(
    "text",
    [
        "no boxes, 3 < 4",
        "<ref>a</ref><box>(0,0),(1000,999)</box><box>( 1, 2.5 ) , (3,4)</box>",
        "<quad>(1,2),(3,4),(2,1),(0,0)</quad> <ref>label alone</ref>",
    ],
)
def test_notation_to_learn_from(text):
    assert boxes.notation_problems(text) == []


def test_every_problem_of_a_notation_is_found():
    text = (
        "</ref><box>(1,2)</box><ref>a<quad>(1,2),(3,4)</quad></box><box>(5,5),(4,6)</box><box>(1,1),(2,1001)</box><box>"
    )
    wanted = ["</ref> at character 0 closes", "box '(1,2)' is not of the form", "<ref> at character 22 is not closed",
              "quad '(1,2),(3,4)' is not of the form", "</box> at character", "turned round", "out of range",
              "is not closed; add </box>"]  # fmt: skip
    found = boxes.notation_problems(text)
    assert len(found) == len(wanted)
    assert all(part in problem for part, problem in zip(wanted, found, strict=True))


@given(st.text("<>/refboxquad(),0123456789 .", max_size=40))
def test_any_text_is_looked_through(text):
    assert all(isinstance(problem, str) for problem in boxes.notation_problems(text))


def test_both_answers_boxes_are_drawn():
    picture = Image.new("RGB", (50, 100), "black")
    shown = draw_answers(picture, {"one": [Box(None, 5, 5, 45, 90)], "other": [Box(None, 15, 15, 45, 90)]}, 448)
    assert shown.size == (224, 448)
    assert len(np.unique(np.asarray(shown).reshape(-1, 3), axis=0)) > 3  # two colours of boxes, black and letters
