"""Turns a scene into pixels with Pillow. It decides nothing: every choice was made when the scene was sampled.

Shapes are drawn as masks at `SUPERSAMPLE` times the resolution and reduced, so edges are smooth; a whole picture takes
about a millisecond.
"""

import functools
import importlib.resources
import io
import math
import typing

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwenvl_jax.data.scene_paint import Background, Rgb

if typing.TYPE_CHECKING:
    from qwenvl_jax.data.scenes import Scene, SceneObject, SceneText

SUPERSAMPLE = 3
OUTLINE_SHARE = 0.82  # of the shape that stays in its own paint when it has an outline
SHADING = 0.14  # a gradient fill runs from 1 + SHADING to 1 - SHADING of the paint


@functools.cache
def _font_bytes() -> bytes:
    return importlib.resources.files("qwenvl_jax").joinpath("assets/fonts/DejaVuSans-Bold.ttf").read_bytes()


@functools.lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font at `size` pixels per em. Basic layout: no shaping library, so the same pixels on every machine."""
    return ImageFont.truetype(io.BytesIO(_font_bytes()), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def glyph_metrics(character: str) -> tuple[float, float, float, float, float]:
    """(advance, x1, y1, x2, y2): the way of the pen and the box of the ink, in heights of a capital, y down.

    Pillow's `getbbox` spans the pen's way too, so the ink is found on a drawn letter.
    """
    pad = 100
    letter = Image.new("L", (800, 800))
    ImageDraw.Draw(letter).text((pad, 600), character, fill=255, font=_font(500), anchor="ls")
    x1, y1, x2, y2 = letter.getbbox() or (pad, 600, pad, 600)
    capital = -_font(500).getbbox("H", anchor="ls")[1]
    advance = _font(500).getlength(character)
    return advance / capital, (x1 - pad) / capital, (y1 - 600) / capital, (x2 - pad) / capital, (y2 - 600) / capital


def draw_scene(scene: "Scene", scale: float = 1) -> Image.Image:
    """The picture as PIL RGB of round(width * scale) x round(height * scale) pixels."""
    size = (round(scene.width * scale), round(scene.height * scale))
    picture = _draw_background(scene.background, (scene.width, scene.height), size)
    for thing in scene.objects:
        _draw_object(picture, thing, scale)
    if scene.text is not None:
        _draw_text(picture, scene.text, scale)
    return picture


def _draw_background(background: Background, native: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    if background.kind in ("paper", "plain"):
        return Image.new("RGB", size, background.first)
    if background.kind == "noise":
        width, height = native
        mask = np.frombuffer(np.random.PCG64(background.seed).random_raw(-(-width * height // 8)).tobytes(), np.uint8)
        mask = Image.fromarray(mask[: width * height].reshape(height, width))
        mask = mask if size == native else mask.resize(size, Image.Resampling.NEAREST)
    else:
        mask = _pattern(background, native, size)
    return Image.composite(Image.new("RGB", size, background.second), Image.new("RGB", size, background.first), mask)


def _pattern(background: Background, native: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """The share of the second colour, as PIL L, for gradients, stripes and checkers."""
    x = (np.arange(size[0], dtype=np.float32) + 0.5) * (native[0] / size[0])
    y = (np.arange(size[1], dtype=np.float32) + 0.5)[:, None] * (native[1] / size[1])
    cosine, sine = math.cos(background.angle), math.sin(background.angle)
    if background.kind == "gradient":
        along = x * cosine + y * sine
        low, high = float(along.min()), float(along.max())
        return Image.fromarray(((along - low) * (255 / (high - low))).astype(np.uint8))
    if background.kind == "stripes":
        odd = ((x * cosine + y * sine) // background.period).astype(np.int32) & 1
    else:
        odd = ((x // background.period).astype(np.int32) + (y // background.period).astype(np.int32)) & 1
    return Image.fromarray((odd * 255).astype(np.uint8))


def _mask(thing: "SceneObject", scale: float, origin: tuple[int, int], size: tuple[int, int], share: float = 1.0):
    """Coverage of the shape, shrunk to `share` of its size around its centre, in the window at `origin`; PIL L."""
    factor = scale * SUPERSAMPLE
    mask = Image.new("L", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE))
    draw = ImageDraw.Draw(mask)
    # Pillow's coordinates name the middle of a pixel, ours its edges.
    shift = np.array([origin[0] * SUPERSAMPLE + 0.5, origin[1] * SUPERSAMPLE + 0.5])
    centre = np.array([thing.x, thing.y])
    vertices = thing.vertices
    if vertices is None:
        half = thing.side / 2 * share
        corners = np.array([centre - half, centre + half]) * factor - shift
        draw.ellipse(corners.ravel().tolist(), fill=255)
    else:
        corners = (centre + (vertices - centre) * share) * factor - shift
        draw.polygon(corners.ravel().tolist(), fill=255)
    return mask.reduce(SUPERSAMPLE)


def _shaded(rgb: Rgb, size: tuple[int, int], angle: float) -> Image.Image:
    """A tile of the paint, lighter on one side than on the other."""
    width, height = size
    along = np.linspace(-1, 1, width) * math.cos(angle) + np.linspace(-1, 1, height)[:, None] * math.sin(angle)
    factor = 1 + SHADING * along[..., None] / (abs(math.cos(angle)) + abs(math.sin(angle)))
    return Image.fromarray(np.clip(np.asarray(rgb) * factor, 0, 255).astype(np.uint8))


def _outline_rgb(rgb: Rgb) -> Rgb:
    """A darker shade of the paint, or a dark grey around black."""
    red, green, blue = rgb
    return (round(red * 0.6), round(green * 0.6), round(blue * 0.6)) if max(rgb) > 60 else (84, 84, 84)


def _draw_object(picture: Image.Image, thing: "SceneObject", scale: float) -> None:
    x1, y1, x2, y2 = (value * scale for value in thing.box)
    origin = (math.floor(x1) - 1, math.floor(y1) - 1)
    size = (math.ceil(x2) + 1 - origin[0], math.ceil(y2) + 1 - origin[1])
    mask = _mask(thing, scale, origin, size)
    if thing.fill == "outline":
        picture.paste(_outline_rgb(thing.rgb), (*origin, origin[0] + size[0], origin[1] + size[1]), mask)
        mask = _mask(thing, scale, origin, size, OUTLINE_SHARE)
    if thing.fill == "gradient":
        picture.paste(_shaded(thing.rgb, size, thing.x + thing.y), origin, mask)
    else:
        picture.paste(thing.rgb, (*origin, origin[0] + size[0], origin[1] + size[1]), mask)


def _draw_text(picture: Image.Image, text: "SceneText", scale: float) -> None:
    """Letter by letter, each where its glyph box says, so that boxes hold at every scale."""
    em_per_capital = 1000 / -_font(1000).getbbox("H", anchor="ls")[1]
    font = _font(round(text.height * scale * em_per_capital))
    draw = ImageDraw.Draw(picture)
    for character, box in zip(text.text, text.glyph_boxes, strict=True):
        left = box[0] - glyph_metrics(character)[1] * text.height
        draw.text((left * scale, text.baseline * scale), character, fill=text.rgb, font=font, anchor="ls")
