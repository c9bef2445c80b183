"""Checks a list of messages and makes it typed: the one place that says what a message may hold.

A message is `{"role": "system"|"user"|"assistant", "content": str | [part, ...]}`, a part one of

    {"type": "text", "text": str}
    {"type": "image", "image": path, URL, bytes, data URI, PIL image or array}
    {"type": "image_url", "image_url": {"url": ...}}                     # OpenAI's spelling of the same
    {"type": "box", "box": [x1, y1, x2, y2], "label": str or None, "image": int}
    {"type": "quad", "quad": [x1, y1, ..., x4, y4], "label": ..., "image": ...}   # four corners, for slanted things
    {"type": "ref", "ref": str}                                          # a label whose box is asked for

Boxes are in pixels of the source picture; `image` numbers the pictures of the whole conversation from 0 and is the
latest one where absent. How messages become tokens is in `template.py`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.image_errors import ImageError

ROLES = ("system", "user", "assistant")
_PART_KEYS = {
    "text": {"type", "text"},
    "image": {"type", "image"},
    "image_url": {"type", "image_url"},
    "box": {"type", "box", "label", "image"},
    "quad": {"type", "quad", "label", "image"},
    "ref": {"type", "ref"},
}


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    index: int  # over the conversation, from 0


@dataclasses.dataclass(frozen=True)
class Ref:
    label: str


@dataclasses.dataclass(frozen=True)
class BoxPart:
    corners: tuple[float, ...]  # x1, y1, x2, y2 in pixels of the source picture; of a quad x1, y1 to x4, y4
    label: str | None
    size: tuple[int, int]  # width and height of that picture


Part = Text | Picture | Ref | BoxPart


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    parts: tuple[Part, ...]

    @property
    def pictures(self) -> int:
        """How many pictures the message holds."""
        return sum(isinstance(part, Picture) for part in self.parts)


RawPart = Mapping[str, Any]


def read_messages(
    messages: Sequence[Mapping[str, Any]], load: Callable[[Any], Image.Image], last_role: str
) -> tuple[list[Message], list[Image.Image]]:
    """Typed messages and all their pictures in order, each loaded once by `load`.

    An optional system message comes first, then user and assistant take turns, and the last message is of
    `last_role`. Raises UserError that names the message, the part and the field.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages must be a list of messages, not {type(messages).__name__}")
    roles = [_role(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _check_order(roles, last_role)
    contents = [_content(message, f"messages[{i}]") for i, message in enumerate(messages)]
    pictures: dict[str, Image.Image] = {}
    for parts in contents:
        for where, part in parts.items():
            if part["type"] in ("image", "image_url"):
                pictures[where] = _load(part, where, load)
    loaded = list(pictures.values())
    read: list[Message] = []
    seen = 0
    for role, parts in zip(roles, contents, strict=True):
        typed: list[Part] = []
        for where, part in parts.items():
            if part["type"] == "text":
                typed.append(Text(part["text"]))
            elif part["type"] == "ref":
                typed.append(Ref(part["ref"]))
            elif part["type"] in ("box", "quad"):
                typed.append(_box(part, where, loaded, seen))
            else:
                typed.append(Picture(seen))
                seen += 1
        read.append(Message(role, tuple(typed)))
    return read, loaded


def _role(message: Any, where: str) -> str:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} must be a dictionary with role and content, not {type(message).__name__}")
    for key in ("role", "content"):
        if key not in message:
            raise UserError(f"{where} has no {key!r}")
    if message["role"] not in ROLES:
        raise UserError(f"{where}.role is {message['role']!r}; use one of {', '.join(ROLES)}")
    return message["role"]


def _check_order(roles: Sequence[str], last_role: str) -> None:
    if not roles:
        raise UserError("messages is empty; give at least one message of role 'user'")
    first = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise UserError(
                f"messages[{first + i}].role is {role!r}, expected {expected!r}: "
                "after an optional system message, user and assistant take turns"
            )
    if roles[-1] != last_role:
        raise UserError(
            f"messages[{len(roles) - 1}].role is {roles[-1]!r}; the last message must be of role {last_role!r}"
        )


def _content(message: RawPart, where: str) -> dict[str, RawPart]:
    """The parts of a message by their names, checked but for the pictures."""
    content = message["content"]
    if isinstance(content, str):
        return {f"{where}.content": {"type": "text", "text": content}}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"{where}.content must be a string or a list of parts, not {type(content).__name__}")
    if not content:
        raise UserError(f"{where}.content has no parts")
    parts = {f"{where}.content[{j}]": part for j, part in enumerate(content)}
    for name, part in parts.items():
        _check_part(part, message["role"], name)
    return parts


def _check_part(part: Any, role: str, where: str) -> None:
    if not isinstance(part, Mapping):
        raise UserError(f"{where} must be a dictionary with a type, not {type(part).__name__}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        raise UserError(f"{where}.type is {kind!r}; use one of {', '.join(_PART_KEYS)}")
    if kind not in part:
        raise UserError(f"{where} is of type {kind!r} but has no {kind!r}")
    unknown = set(part) - _PART_KEYS[kind]
    if unknown:
        raise UserError(
            f"{where} has an unknown key {min(map(str, unknown))!r}; a part of type {kind!r} has "
            + ", ".join(sorted(_PART_KEYS[kind]))
        )
    if kind in ("text", "ref") and not isinstance(part[kind], str):
        raise UserError(f"{where}.{kind} must be a string, not {type(part[kind]).__name__}")
    url = part.get("image_url")
    if kind == "image_url" and not (isinstance(url, Mapping) and isinstance(url.get("url"), str)):
        raise UserError(f"{where}.image_url must be a dictionary with a string 'url'")
    if kind in ("image", "image_url") and role != "user":
        raise UserError(f"{where} is a picture in a message of role {role!r}; pictures belong to user messages")
    if kind in ("box", "quad", "ref") and role == "system":
        raise UserError(f"{where} is a {kind} in the system message; it belongs to user and assistant messages")


def _load(part: RawPart, where: str, load: Callable[[Any], Image.Image]) -> Image.Image:
    field, source = ("image", part["image"]) if part["type"] == "image" else ("image_url.url", part["image_url"]["url"])
    try:
        return load(source)
    except ImageError as error:
        raise error.at(f"{where}.{field}") from None
    except UserError as error:
        raise UserError(f"{where}.{field}: {error}") from None


def _box(part: RawPart, where: str, pictures: Sequence[Image.Image], seen: int) -> BoxPart:
    """A box or quad part, checked against its picture; `seen` counts the pictures before it."""
    kind = part["type"]
    label, index = part.get("label"), part.get("image", seen - 1)
    if label is not None and not isinstance(label, str):
        raise UserError(f"{where}.label must be a string or None, not {type(label).__name__}")
    if "image" not in part and not seen:
        raise UserError(f"{where} has no picture before it; name the picture with 'image'")
    if isinstance(index, bool) or not isinstance(index, int):
        raise UserError(f"{where}.image must be the number of a picture, not {index!r}")
    if not 0 <= index < len(pictures):
        raise UserError(f"{where}.image is {index}, but the conversation has {len(pictures)} pictures, counted from 0")
    corners = _corners(part[kind], kind, f"{where}.{kind}")
    width, height = pictures[index].size
    xs, ys = corners[0::2], corners[1::2]
    inside = all(0 <= x <= width for x in xs) and all(0 <= y <= height for y in ys)
    if not inside or (kind == "box" and (xs[0] > xs[1] or ys[0] > ys[1])):
        raise UserError(
            f"{where}.{kind} {list(corners)} is not inside its picture of {width} x {height} pixels; "
            f"give {'[left, top, right, bottom]' if kind == 'box' else '[x1, y1, ..., x4, y4]'} in pixels"
        )
    return BoxPart(corners, label, (width, height))


def _corners(box: Any, kind: str, where: str) -> tuple[float, ...]:
    count, form = (4, "four numbers [x1, y1, x2, y2]") if kind == "box" else (8, "eight numbers [x1, y1, ..., x4, y4]")
    values = list(box) if isinstance(box, Sequence) or getattr(box, "ndim", 0) == 1 else []
    real = [value for value in values if not isinstance(value, bool) and isinstance(value, numbers.Real)]
    try:
        corners = tuple(map(float, real))
    except OverflowError:  # a whole number of hundreds of digits
        corners = ()
    if len(values) != count or len(corners) != count or not all(map(math.isfinite, corners)):
        raise UserError(f"{where} must be {form} in pixels, not {str(box)[:60]}")
    return corners
