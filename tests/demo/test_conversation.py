import base64
import io

import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.demo import pictures
from qwenvl_jax.demo.conversation import Turn, boxes_of, bubbles, messages, view
from qwenvl_jax.demo.pictures import Picture, accept

REPLY = "<ref>the cat</ref><box>(100,200),(300,400)</box>"


@pytest.fixture
def picture(tmp_path) -> Picture:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "street.png")
    return accept(str(tmp_path / "street.png"))


@pytest.fixture
def other(tmp_path) -> Picture:
    Image.new("RGB", (1000, 500), "blue").save(tmp_path / "sea.jpg")
    return accept(str(tmp_path / "sea.jpg"))


def test_the_model_reads_its_own_notation_and_the_page_does_not(picture, other):
    turns = (Turn("Where?", (picture, other), REPLY), Turn("Why?"))
    system, first, second, third = messages(turns, "Be kind.", "high")
    assert system == {"role": "system", "content": "Be kind."}
    assert [part["type"] for part in first["content"]] == ["image_url", "image_url", "text"]
    assert first["content"][0]["image_url"]["detail"] == "high"
    assert second == {"role": "assistant", "content": REPLY}
    assert third["content"] == [{"type": "text", "text": "Why?"}]
    assert bubbles(turns)[1]["content"] == ["the cat [1]"]


def test_every_turn_has_two_bubbles_so_that_a_number_tells_its_turn(picture):
    turns = (Turn("Hello", (picture,), ""), Turn("Why?", (), "Because", "stopped"), Turn("And?"))
    assert [bubble["role"] for bubble in bubbles(turns)] == ["user", "assistant"] * 3
    assert len(bubbles(turns, waiting=True)) == 5
    assert bubbles(turns)[3]["content"] == ["Because\n\n*stopped*"]


@pytest.mark.parametrize(
    ("question", "reply", "images"),
    [
        ("Where is it?", REPLY, [1]),
        ("Where is it in Picture 1?", REPLY, [0]),
        ("图1中它在哪里？", REPLY, [0]),
        ("Where is it?", f"In Picture 1: {REPLY} and in Picture 2: {REPLY}", [0, 1]),
        ("Where is it in Picture 7?", REPLY, [1]),
        ("Where is it?", "<ref>the cat</ref><box>(100,200),(300", []),
        ("Where is it?", "nowhere", []),
    ],
)
def test_boxes_are_on_the_picture_that_was_named_last(picture, other, question, reply, images):
    turns = (Turn("Look.", (picture, other), "Yes."), Turn(question, (), reply))
    boxes = boxes_of(turns)
    assert [box.image for box in boxes] == images
    for box in boxes:
        width, height = ((200, 100), (1000, 500))[box.image]
        corners = (width // 10, height // 5, width * 3 // 10, height * 2 // 5)
        assert (box.label, box.x1, box.y1, box.x2, box.y2) == ("the cat", *corners)
    assert view(turns)["shown"] == (images[0] if images else 1)


def test_a_box_without_a_picture_is_not_drawn():
    assert boxes_of((Turn("Where?", (), REPLY),)) == []
    assert view((Turn("Where?", (), REPLY),)) == {"pictures": [], "shown": None, "boxes": []}
    assert bubbles((Turn("Where?", (), REPLY),))[1]["content"] == ["the cat"]


def test_a_box_in_a_question_is_a_place_on_the_picture(picture, other):
    turn = Turn("Is Picture 1 <box>(100,200),(300,400)</box> a cat?", (picture, other))
    (message,) = messages((turn,))
    assert message["content"][2:] == [
        {"type": "text", "text": "Is Picture 1 "},
        {"type": "box", "box": [20, 20, 60, 40], "image": 0},
        {"type": "text", "text": " a cat?"},
    ]
    (message,) = messages((turn,), box_parts=False)
    assert message["content"][2:] == [{"type": "text", "text": turn.question}]


@pytest.mark.parametrize("question", ["<box>(1,2),(3,4)</box>", "<box>(1,2),(3,4000)</box> <box>1</box>"])
def test_what_is_no_place_stays_text(question, picture):
    pictures = (picture,) if "4000" in question else ()
    (message,) = messages((Turn(question, pictures),))
    assert message["content"][-1] == {"type": "text", "text": question}


def test_pictures_are_sent_as_they_came_unless_they_are_very_large(picture, tmp_path):
    uri = pictures.data_uri(picture)
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == (tmp_path / "street.png").read_bytes()
    Image.new("RGB", (4096, 1000), "green").save(tmp_path / "wide.png")
    wide = accept(str(tmp_path / "wide.png"))
    assert (wide.width, wide.height) == (4096, 1000)
    sent = Image.open(io.BytesIO(base64.b64decode(pictures.data_uri(wide).removeprefix("data:image/jpeg;base64,"))))
    assert sent.size == (2048, 500) == pictures.sent_size(wide)
    (message,) = messages((Turn("What is <box>(500,500),(1000,1000)</box>?", (wide,)),))
    assert message["content"][2]["box"] == [1024, 250, 2048, 500]  # in pixels of what is sent


@pytest.mark.parametrize("form", ["TIFF", "BMP", "camera", "animation"])
def test_what_browsers_show_otherwise_becomes_a_png(form, tmp_path):
    path = tmp_path / f"picture.{form.lower()}"
    image = Image.new("RGB", (30, 20), "red")
    match form:
        case "camera":
            exif = Image.Exif()
            exif[0x0112] = 6  # turned by a quarter
            image.save(path, "JPEG", exif=exif)
        case "animation":
            image.save(path, "GIF", save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")])
        case _:
            image.save(path, form)
    taken = accept(str(path))
    with Image.open(taken.path) as kept:
        assert kept.format == "PNG"
        assert kept.size == (taken.width, taken.height) == ((20, 30) if form == "camera" else (30, 20))
    assert taken.name == path.name


def test_a_mistake_names_the_file_as_the_visitor_knows_it(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(pictures.MOST_BYTES + 1))
    for name, reason in (("text.png", "text.png"), ("large.png", "larger than 10 MB")):
        with pytest.raises(UserError, match=reason) as error:
            accept(str(tmp_path / name))
        assert str(tmp_path) not in str(error.value)


def test_a_picture_that_is_gone_is_named(picture, tmp_path):
    (tmp_path / "street.png").unlink()
    with pytest.raises(UserError, match=r"street\.png is no longer kept"):
        messages((Turn("What?", (picture,)),))
