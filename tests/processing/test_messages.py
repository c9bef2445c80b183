"""Messages are checked, and every mistake is named by message, part and field."""

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.images import load_image
from qwenvl_jax.processing.messages import BoxPart, Message, Picture, Ref, Text, read_messages

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (60, 20), "blue")


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def image(picture=RED) -> dict:
    return {"type": "image", "image": picture}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def box(*corners, **more) -> dict:
    return {"type": "box", "box": list(corners), **more}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def read(messages, last_role="user"):
    return read_messages(messages, load_image, last_role)


def test_a_conversation():
    messages, pictures = read(
        [
            {"role": "system", "content": "Be brief."},
            user(image(RED), text("What?")),
            assistant([text("This: "), box(1, 2, 3, 4, label="x")]),
            user(image(BLUE), box(0, 0.5, 60, 20), box(0, 0, 40, 30, image=0), text("?")),
        ]
    )
    assert [picture.size for picture in pictures] == [(40, 30), (60, 20)]
    assert messages == [
        Message("system", (Text("Be brief."),)),
        Message("user", (Picture(0), Text("What?"))),
        Message("assistant", (Text("This: "), BoxPart((1, 2, 3, 4), "x", (40, 30)))),
        Message(
            "user",
            (Picture(1), BoxPart((0, 0.5, 60, 20), None, (60, 20)), BoxPart((0, 0, 40, 30), None, (40, 30)), Text("?")),
        ),
    ]
    assert [message.pictures for message in messages] == [0, 1, 0, 1]


def test_the_spelling_of_openai(tmp_path):
    RED.save(tmp_path / "red.png")
    messages, pictures = read(
        [user({"type": "image_url", "image_url": {"url": str(tmp_path / "red.png"), "detail": "low"}})]
    )
    assert messages[0].parts == (Picture(0),)
    assert pictures[0].size == (40, 30)


def test_a_box_may_come_before_a_picture_that_it_names():
    messages, _ = read([user(box(0, 0, 40, 30, image=0), image())])
    assert messages[0].parts[0] == BoxPart((0, 0, 40, 30), None, (40, 30))


def test_labels_and_quads():
    quad = {"type": "quad", "quad": [0, 1, 40, 0, 39, 30, 2, 28.5], "label": "a page"}
    messages, _ = read([user(image(RED), {"type": "ref", "ref": "the page"}, quad)])
    assert messages[0].parts[1:] == (Ref("the page"), BoxPart((0, 1, 40, 0, 39, 30, 2, 28.5), "a page", (40, 30)))


def test_arrays_are_fine_as_boxes():
    messages, _ = read([user(image(), {"type": "box", "box": np.array([1, 2, 3, 4], np.float32)})])
    assert messages[0].parts[1].corners == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list of messages, not str"),
        ({"role": "user", "content": "x"}, "messages must be a list of messages, not dict"),
        (None, "messages must be a list of messages, not NoneType"),
        (["hello"], "messages[0] must be a dictionary with role and content, not str"),
        ([{"content": "x"}], "messages[0] has no 'role'"),
        ([{"role": "user"}], "messages[0] has no 'content'"),
        ([{"role": "tool", "content": "x"}], "messages[0].role is 'tool'; use one of system, user, assistant"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role is ['user']"),
        ([assistant("x")], "messages[0].role is 'assistant', expected 'user'"),
        ([user(text("x")), user(text("y"))], "messages[1].role is 'user', expected 'assistant'"),
        (
            [user(text("x")), {"role": "system", "content": "y"}],
            "messages[1].role is 'system', expected 'assistant'",
        ),
        (
            [user(text("x")), assistant("y")],
            "messages[1].role is 'assistant'; the last message must be of role 'user'",
        ),
        ([{"role": "system", "content": "x"}], "messages[0].role is 'system'; the last message must be"),
        (
            [{"role": "user", "content": None}],
            "messages[0].content must be a string or a list of parts, not NoneType",
        ),
        ([{"role": "user", "content": b"x"}], "messages[0].content must be a string or a list of parts, not bytes"),
        ([{"role": "user", "content": {}}], "messages[0].content must be a string or a list of parts, not dict"),
        ([user()], "messages[0].content has no parts"),
        ([user("x")], "messages[0].content[0] must be a dictionary with a type, not str"),
        ([user({"text": "x"})], "messages[0].content[0].type is None; use one of text, image, image_url, box"),
        ([user(text("x"), {"type": "video"})], "messages[0].content[1].type is 'video'"),
        ([user({"type": "text"})], "messages[0].content[0] is of type 'text' but has no 'text'"),
        ([user({"type": "image"})], "messages[0].content[0] is of type 'image' but has no 'image'"),
        ([user({"type": "text", "text": 3})], "messages[0].content[0].text must be a string, not int"),
        ([user({"type": "ref", "ref": 3})], "messages[0].content[0].ref must be a string, not int"),
        ([user({"type": ["ref"]})], "messages[0].content[0].type is ['ref']"),
        ([user(image(), {"type": "quad", "quad": [1, 2, 3, 4]})], "content[1].quad must be eight numbers"),
        ([user(image(), {"type": "quad", "quad": [1] * 7 + [99]})], "content[1].quad [1.0, 1.0, 1.0, 1.0, 1.0, 1.0"),
        ([user(image(), box(0, 0, 1, 10**400))], "content[1].box must be four numbers"),
        (
            [user(text("x") | {"txt": "y"})],
            "content[0] has an unknown key 'txt'; a part of type 'text' has text, type",
        ),
        (
            [user({"type": "image_url", "image_url": "a.png"})],
            "content[0].image_url must be a dictionary with",
        ),
        ([user({"type": "image_url", "image_url": {"url": 3}})], "content[0].image_url must be a dictionary"),
        (
            [user({"type": "image_url", "image_url": {"url": "absent.png"}})],
            "content[0].image_url.url: absent.png: no such file",
        ),
        ([user(text("x"), image("absent.png"))], "messages[0].content[1].image: absent.png: no such file"),
        ([user(image(None))], "messages[0].content[0].image: no picture: NoneType"),
        (
            [user(image(), text("a")), assistant([image()]), user(text("b"))],
            "messages[1].content[0] is a picture in a message of",
        ),
        (
            [{"role": "system", "content": [image()]}, user(text("x"))],
            "messages[0].content[0] is a picture in",
        ),
        (
            [{"role": "system", "content": [box(1, 2, 3, 4)]}, user(text("x"))],
            "content[0] is a box in the system message",
        ),
        ([user(box(1, 2, 3, 4), image())], "messages[0].content[0] has no picture before it"),
        ([user(image(), box(1, 2, 3, 4, image=1))], "content[1].image is 1, but the conversation has 1 pictures"),
        ([user(image(), box(1, 2, 3, 4, image=-1))], "content[1].image is -1"),
        (
            [user(image(), box(1, 2, 3, 4, image=True))],
            "content[1].image must be the number of a picture, not True",
        ),
        ([user(image(), box(1, 2, 3, 4, image="0"))], "content[1].image must be the number of a picture, not '0'"),
        ([user(image(), box(1, 2, 3, 4, label=5))], "content[1].label must be a string or None, not int"),
        ([user(image(), box(1, 2, 3))], "content[1].box must be four numbers"),
        ([user(image(), box(1, 2, 3, float("nan")))], "content[1].box must be four numbers"),
        ([user(image(), box(1, 2, 3, "4"))], "content[1].box must be four numbers"),
        ([user(image(), box(1, 2, 3, True))], "content[1].box must be four numbers"),
        ([user(image(), {"type": "box", "box": "1234"})], "content[1].box must be four numbers"),
        ([user(image(), {"type": "box", "box": None})], "content[1].box must be four numbers"),
        (
            [user(image(), box(0, 0, 41, 30))],
            "content[1].box [0.0, 0.0, 41.0, 30.0] is not inside its picture of 40 x 30 pixels",
        ),
        ([user(image(), box(-1, 0, 4, 3))], "is not inside its picture"),
        ([user(image(), box(5, 0, 4, 3))], "is not inside its picture"),
    ],
)
def test_mistakes_are_named(messages, message):
    with pytest.raises(UserError) as caught:
        read(messages)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_picture_is_opened_before_the_structure_is_right():
    def explode(source):
        raise AssertionError("a picture was opened")

    with pytest.raises(UserError, match=r"messages\[1\]\.role"):
        read_messages([user(image()), user(text("x"))], explode, "user")
