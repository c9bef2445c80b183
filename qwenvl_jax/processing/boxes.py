"""Boxes: from a reply's text to pixels of the source picture, back into text, and onto the picture.

Text carries corners as `<box>(x1,y1),(x2,y2)</box>` in thousandths of the picture's width and height, with the label
before it as `<ref>label</ref>` (Qwen-VL paper, section 2.2). Inside this project boxes are always source pixels; this
file is the border.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qwenvl_jax.config import UserError

FONT_FILE = Path(__file__).parents[1] / "assets" / "fonts" / "NotoSansSC-Subset.otf"
# Far apart in hue and lightness, strongest first.
COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#ffe119",
    "#f032e6",
    "#42d4f4",
    "#f58231",
    "#911eb4",
    "#bfef45",
    "#469990",
    "#9a6324",
    "#000075",
)
_SMALLEST_FONT = 8  # below this no glyph can be read

Plate = tuple[int, int, int, int]  # left, top, right, bottom of a drawn label, all within it

_NUMBER = r"\s*([0-9]{1,4}(?:\.[0-9]+)?)\s*"
_CORNERS = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*")
_POINT = re.compile(rf"\({_NUMBER},{_NUMBER}\)")
_TAG = re.compile(r"<(/?)(ref|box|quad)>")
_NOTATION = re.compile(r"<(ref|box)>((?:(?!</?(?:ref|box)>).)*)</\1>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle on a source picture: whole pixels from its left and top edge, x1 <= x2 and y1 <= y2.

    `image` numbers the picture within the conversation, from 0.
    """

    label: str | None
    x1: int
    y1: int
    x2: int
    y2: int
    image: int = 0


def to_pixels(thousandths: float, extent: int) -> int:
    """A coordinate of the text as a pixel of a side `extent` pixels long; truncated, with the original's rounding."""
    return int(thousandths / 1000 * extent)


def to_thousandths(pixel: float, extent: int) -> int:
    """The smallest number in 0..999 that `to_pixels` turns into `pixel` (or its whole part) again.

    The inverse is exact for sides up to 1,000 pixels; the outermost edge `extent` becomes 999, the last number there
    is.
    """
    number = math.ceil(pixel * 1000 / extent - 1e-6)  # the slack undoes the rounding of a product and a quotient
    if to_pixels(number, extent) < int(pixel):  # 290 / 1000 * 100 is 28.99..
        number += 1
    return min(max(number, 0), 999)


def corners_text(corners: Sequence[float], size: tuple[int, int]) -> str:
    """`(x1,y1),(x2,y2)` in thousandths for corners [x1, y1, x2, y2] in pixels of a picture of this `size`.

    A quad has four points, [x1, y1, ..., x4, y4].
    """
    points = zip(corners[0::2], corners[1::2], strict=True)
    return ",".join(f"({to_thousandths(x, size[0])},{to_thousandths(y, size[1])})" for x, y in points)


def render(label: str | None, corners: Sequence[float], size: tuple[int, int]) -> str:
    """`<ref>label</ref><box>(x1,y1),(x2,y2)</box>`, without the ref where `label` is None. All given in pixels."""
    reference = "" if label is None else f"<ref>{label}</ref>"
    return f"{reference}<box>{corners_text(corners, size)}</box>"


def read_corners(text: str, kind: str) -> list[float]:
    """The numbers in a box (two points) or quad (four) of a training text, in thousandths; the inverse of `parse`'s
    leniency: raises UserError for another form, numbers above 1000, and a box whose corners are not in order.
    """
    points = _POINT.findall(text)
    expected = 2 if kind == "box" else 4
    form = ",".join(f"(x{number},y{number})" for number in range(1, expected + 1))
    if len(points) != expected or re.sub(r"\s", "", _POINT.sub("", text)) != "," * (expected - 1):
        raise UserError(f"the {kind} {text[:60]!r} is not of the form {form} with numbers from 0 to 1000")
    numbers = [float(number) for point in points for number in point]
    if max(numbers) > 1000:
        raise UserError(f"the {kind} {text!r} is out of range; coordinates are thousandths of the picture, 0 to 1000")
    if kind == "box" and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
        raise UserError(f"the box {text!r} is turned round; give the top left corner first, then the bottom right one")
    return numbers


def notation_problems(text: str) -> list[str]:
    """What is wrong with the ref, box and quad tags of an answer to learn from: unclosed tags, unreadable boxes."""
    wrong: list[str] = []
    opening: re.Match | None = None
    for tag in _TAG.finditer(text):
        closes, kind = tag.groups()
        if not closes:
            if opening:
                wrong.append(_unclosed(opening))
            opening = tag
        elif opening is None or opening[2] != kind:
            wrong.append(f"</{kind}> at character {tag.start()} closes nothing; put <{kind}> before it or remove it")
        else:
            if kind != "ref":
                try:
                    read_corners(text[opening.end() : tag.start()], kind)
                except UserError as error:
                    wrong.append(str(error))
            opening = None
    return wrong + ([_unclosed(opening)] if opening else [])


def _unclosed(opening: re.Match) -> str:
    return f"<{opening[2]}> at character {opening.start()} is not closed; add </{opening[2]}>"


def parse(text: str, size: tuple[int, int], image: int = 0) -> list[Box]:
    """The boxes in a reply about a picture of `size` (width, height in pixels), in their order.

    A label counts for all boxes that follow it with nothing but blanks between. Corners in the wrong order are
    swapped. What is not four numbers in 0..1000 is skipped: a model may write anything, and its text stays with the
    caller.
    """
    found: list[Box] = []
    label, end = None, 0
    for match in _NOTATION.finditer(text):
        if text[end : match.start()].strip():
            label = None
        end = match.end()
        kind, inner = match.groups()
        if kind == "ref":
            label = inner.strip()
            continue
        corners = _CORNERS.fullmatch(inner)
        numbers = [float(number) for number in corners.groups()] if corners else [math.inf]
        if max(numbers) <= 1000:
            xs = sorted(to_pixels(number, size[0]) for number in numbers[0::2])
            ys = sorted(to_pixels(number, size[1]) for number in numbers[1::2])
            found.append(Box(label, xs[0], ys[0], xs[1], ys[1], image))
    return found


def draw(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the RGB `image` with `boxes` and their labels drawn on it.

    Boxes with the same label share a colour, one without a label gets its own; the colours depend on nothing but the
    order. Lines and letters grow with the picture. Label plates stay inside it, and off each other where they can; a
    label too long for the picture ends in "…". Boxes that reach outside are clipped.
    """
    drawn = image.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    width, height = drawn.size
    scale = math.sqrt(width * height)
    line = max(1, round(scale / 200))
    colours = _colours([box.label for box in boxes])
    for box, colour in zip(boxes, colours, strict=True):
        xs = sorted(min(max(x, 0), width - 1) for x in (box.x1, box.x2))
        ys = sorted(min(max(y, 0), height - 1) for y in (box.y1, box.y2))
        canvas.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=colour, width=line)
    plates: list[Plate] = []
    for box, colour in zip(boxes, colours, strict=True):  # labels last: no line crosses them
        if box.label:
            _draw_label(canvas, drawn.size, box, colour, max(12, round(scale / 30)), plates)
    return drawn


def draw_answers(image: Image.Image, answers: Mapping[str, Sequence[Box]], side: int) -> Image.Image:
    """The RGB `image`, its longer side resized to `side` pixels, with the boxes of several answers, each of which has
    the name of its answer."""
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    labelled = [
        Box(name, *(round(corner * scale) for corner in (box.x1, box.y1, box.x2, box.y2)))
        for name, found in answers.items()
        for box in found
    ]
    return draw(image.resize(size, Image.Resampling.LANCZOS), labelled)


def _draw_label(
    canvas: ImageDraw.ImageDraw, size: tuple[int, int], box: Box, colour: str, font_size: int, plates: list[Plate]
) -> None:
    """A filled plate with the label above a box's top left corner, or inside the box when there is no room above.

    Where another of the `plates` is, it goes below the box if it can. Adds its own plate to them.
    """
    width, height = size
    font_size = min(font_size, int(height / 1.6))
    if font_size < _SMALLEST_FONT:
        return
    label_font = font(font_size)
    padding = font_size // 5
    text = _fitting(box.label or "", label_font, width - 2 * padding)
    if not text:
        return
    ascent, descent = label_font.getmetrics()
    plate_width = math.ceil(label_font.getlength(text)) + 2 * padding
    plate_height = min(ascent + descent, height)
    left = min(max(box.x1, 0), width - plate_width)

    def plate(top: int) -> Plate:
        top = min(max(top, 0), height - plate_height)
        return left, top, left + plate_width - 1, top + plate_height - 1

    wanted = plate(box.y1 - plate_height if box.y1 >= plate_height else box.y1)
    place = next((p for p in (wanted, plate(box.y2 + 1)) if not any(_overlap(p, other) for other in plates)), wanted)
    plates.append(place)
    canvas.rectangle(place, fill=colour)
    canvas.text((place[0] + padding, place[1]), text, font=label_font, fill=_readable_on(colour))


def _overlap(first: Plate, second: Plate) -> bool:
    return all(first[i] <= second[i + 2] and second[i] <= first[i + 2] for i in (0, 1))


@functools.lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The label font, which has the Latin-1, GB2312 and kana glyphs, at `size` pixels."""
    return ImageFont.truetype(str(FONT_FILE), size, layout_engine=ImageFont.Layout.BASIC)


def _fitting(label: str, label_font: ImageFont.FreeTypeFont, width: int) -> str:
    """`label` on one line, cut to `width` pixels; "" when not even one letter fits."""
    label = " ".join("".join(character if character.isprintable() else " " for character in label).split())[:500]
    if label_font.getlength(label) <= width:
        return label
    while label and label_font.getlength(label + "…") > width:
        label = label[:-1]
    return label + "…" if label else ""


def _colours(labels: Sequence[str | None]) -> list[str]:
    numbers: dict[object, int] = {}
    keys = [position if label is None else label for position, label in enumerate(labels)]
    return [COLOURS[numbers.setdefault(key, len(numbers)) % len(COLOURS)] for key in keys]


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
