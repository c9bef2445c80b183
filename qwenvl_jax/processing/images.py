"""Pictures from wherever they come to the network's input: load, convert to RGB, resize, normalise.

The rule of mode "default", stated once:
  - the EXIF orientation is applied; colour profiles are ignored; of an animation the first frame counts
  - transparency is composited on white
  - 16-bit grey (and Pillow's 32-bit "I") is scaled to 8 bits; 16-bit colour PNGs keep their high byte (Pillow reads
    them so)
  - floating-point values run from 0 to 1
  - grey, palette, CMYK and the rest go through Pillow's conversion to RGB
Mode "reference" is what the original does, `Image.open(file).convert("RGB")`: EXIF ignored, alpha dropped, 16 bits
clipped.

Nothing here fetches a URL unless told to (`allow_url`); see `download.py` for the guard around that.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.data_uri import data_uri_bytes, is_data_uri
from qwenvl_jax.processing.download import download
from qwenvl_jax.processing.image_errors import ImageError, shortened

MAX_PIXELS = 89_478_485  # width x height; where Pillow, too, begins to suspect a decompression bomb (256 MiB as RGB)
MAX_SIDE = 65_535  # JPEG's; Pillow's tables for a resize grow with the side alone, to gigabytes at a few million
# Formats that Pillow decodes by itself. Left out on purpose: those that start other programs (EPS) or are rarities.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training pictures, RGB
STANDARD_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# What undoes each EXIF orientation (EXIF 2.3, table 6); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How files begin, in lower case, that people take for pictures and that hold no pixels or none that are read here.
_OTHER_FILES = {
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
    b"<!doctype": "HTML",
    b"<html": "HTML",
    b"%pdf": "PDF",
    b"%!ps": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"8bps": "Photoshop",
}
_MOST_READS = 5000  # until a file's first pixels; a large colour profile takes a few hundred
_MOST_SCAN_PIXELS = 8 * MAX_PIXELS  # of a JPEG, scans times pixels; encoders write some ten scans
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF's tags
_LARGE_TILE = 2**22  # pixels
_MOST_BY_PYTHON = 2_000_000  # pixels, or bytes, for those of Pillow's decoders that are not in C

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray
Mode = Literal["default", "reference"]


@dataclasses.dataclass(frozen=True)
class Resized:
    """A picture as the network sees it, for who cannot keep large ones. size: width and height of the picture itself,
    in whose pixels its boxes are."""

    square: Image.Image
    size: tuple[int, int]


def resized(image: Image.Image, image_size: int) -> Resized:
    """What `preprocess` would resize an RGB picture to, with the same result there."""
    return Resized(_square(image, image_size), image.size)


def load_image(source: ImageSource, *, allow_url: bool = False, mode: Mode = "default") -> Image.Image:
    """The picture at `source` as a PIL image of mode RGB.

    `source` is a path, the bytes of a picture file, a `data:` URI, a PIL image, an array, or, with `allow_url`, an
    http(s) URL. Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha), and uint8, uint16 (65535 is white) or
    floating point from 0 to 1. `mode` chooses the conversion, see the head of this file. Raises UserError naming the
    source when it is missing, a folder or of no such type, and as ImageError when it is no picture, truncated, empty
    or larger than MAX_PIXELS.
    """
    if mode not in ("default", "reference"):
        raise UserError(f"mode {mode!r} does not exist; use 'default' or 'reference'")
    content, name = _content(source, allow_url)
    try:
        return _converted(_opened(content, FORMATS, MAX_PIXELS), mode)
    except ImageError as error:
        raise error.at(name) from None


def decode_image(
    content: bytes, *, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS, mode: Mode = "default"
) -> Image.Image:
    """The picture in the bytes of a file, as `load_image` gives it, if it is of `formats` and within `max_pixels`.

    `max_pixels` is at most MAX_PIXELS. Raises ImageError alone.
    """
    return _converted(_opened(content, formats, max_pixels), mode)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of `load_image(source)`, from the file's head, unless the picture lies on its side.

    Raises UserError as `load_image` does, though damage behind the head may go unseen.
    """
    content, name = _content(source, allow_url=False)
    try:
        image = _opened(content, FORMATS, MAX_PIXELS)
        # Formats differ in whether Pillow turns such a picture by itself, so only its pixels tell.
        return _converted(image, "default").size if _orientation(image) in (5, 6, 7, 8) else image.size
    except ImageError as error:
        raise error.at(name) from None


def picture_key(pixels: np.ndarray) -> bytes:
    """A digest of one picture of `preprocess`: what is kept under it holds for no other input of the network."""
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.dtype.name} {pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).view(np.uint8).data)
    return digest.digest()


def _content(source: ImageSource, allow_url: bool) -> tuple[bytes | Image.Image, str]:
    """The bytes of the picture's file, or the picture where it is in memory, and its name in error messages."""
    if isinstance(source, str) and is_data_uri(source):
        try:
            return data_uri_bytes(source), shortened(source)
        except ImageError as error:
            raise error.at(shortened(source)) from None
    if isinstance(source, str) and "://" in source:
        return _fetch(source, allow_url), shortened(source)
    if isinstance(source, str | os.PathLike):
        return _read(source), os.fspath(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), f"the picture of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return source, "the PIL image"
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source)), "the array"
    raise UserError(
        f"no picture: {type(source).__name__}; use a path, bytes, a data URI, a URL, a PIL image or an array"
    )


def preprocess(images: Sequence[Image.Image | Resized], image_size: int) -> np.ndarray:
    """The network's input: float32 [I, 3, S, S] with S = `image_size`, bit for bit that of the original on Pillow 13.

    Each RGB picture is resized to a square by Pillow's bicubic filter (the aspect ratio is not kept), scaled to 0..1
    and normalised with CLIP's mean and standard deviation.
    """
    pixels = np.empty((len(images), 3, image_size, image_size), np.float32)
    for row, image in enumerate(images):
        scaled = np.asarray(_square(image, image_size), np.float32) / np.float32(255)
        pixels[row] = ((scaled - MEAN) / STANDARD_DEVIATION).transpose(2, 0, 1)
    return pixels


def _square(image: Image.Image | Resized, side: int) -> Image.Image:
    """Pillow's bicubic resize in two calls, one for each axis, which fixes their order. What is resized stays.

    Each pass rounds to 8 bits, so the order shows. Pillow before 13 goes along the rows first; 13 goes along the
    columns first where the height shrinks more than twice as much as the width, and the golden values come from it.
    """
    if isinstance(image, Resized):
        assert image.square.size == (side, side), "resized for another model"
        return image.square
    width, height = image.size
    columns_first = height > side and height - side > 2 * (width - side)
    between = (width, side) if columns_first else (side, height)
    return image.resize(between, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)


def _opened(content: bytes | Image.Image, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """The picture with nothing but its head read, and found to be of a size that is worth decoding."""
    image = content if isinstance(content, Image.Image) else _identified(content, formats, max_pixels)
    width, height = image.size
    if not width or not height:
        raise ImageError("image_too_small", f"a picture of {width} x {height} pixels has nothing to see")
    if width * height > max_pixels:
        raise ImageError("image_too_large", f"{width} x {height} is more than {max_pixels:,} pixels; make it smaller")
    if max(width, height) > MAX_SIDE:
        raise ImageError("image_too_large", f"{width} x {height} has a side above {MAX_SIDE:,} pixels; make it smaller")
    return image


def _identified(content: bytes, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """Bytes of a file to a picture, not yet loaded. Pillow raises nearly anything on hostile bytes: a broad except."""
    if not content:
        raise ImageError("empty_image_file", "empty, not a picture")
    start = content[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, kind in _OTHER_FILES.items():
        if start.startswith(magic):
            raise ImageError(
                "unsupported_image_media_type",
                f"{kind}, not a picture in a format that is read here; use one of {', '.join(formats)}",
            )
    try:
        Image.init()  # with `formats`, Pillow looks only among the formats registered so far
        file = _File(content)
        image = Image.open(file, formats=tuple(formats))
        file.reads_left = None
        _check_work(image, content)
        return image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("image_too_large", f"more than {max_pixels:,} pixels; make it smaller") from None
    except Exception:
        # What begins as a format of ours and is none has been damaged.
        if any(accept and accept(content[:16]) is True for _, accept in (Image.OPEN[name] for name in formats)):
            raise ImageError("image_parse_error", "the picture's head is damaged or cut off") from None
        raise ImageError(
            "invalid_image_format", f"not a picture in a format that is read here ({', '.join(formats)})"
        ) from None


class _File(io.BytesIO):
    """A picture's file for Pillow, which joins comments and EXIF blocks in a time that grows with their square."""

    reads_left: int | None = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        if self.reads_left is not None:
            self.reads_left -= 1
            if self.reads_left < 0:
                raise ImageError("image_parse_error", "too many comments or other parts before the picture")
        return super().read(size)


def _check_work(image: Image.Image, content: bytes) -> None:
    """Refuses small files that would take minutes to decode."""
    pixels = image.size[0] * image.size[1]
    # Every scan of a progressive JPEG goes over the whole picture, even one of a few bytes.
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") * pixels > _MOST_SCAN_PIXELS:
        raise ImageError("image_parse_error", "a JPEG of too many scans for its size; save it anew")
    # The decoder makes room for whole tiles, and a tile may be larger than the picture.
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(_TILE_WIDTH, 1) * tags.get(_TILE_LENGTH, 1) > max(4 * pixels, _LARGE_TILE):
            raise ImageError("image_too_large", "a TIFF with tiles much larger than itself; save it anew")
    tiles = getattr(image, "tile", [])
    if max(pixels, len(content)) > _MOST_BY_PYTHON and any(tile.codec_name in Image.DECODERS for tile in tiles):
        raise ImageError("image_too_large", "too large for its rare compression; save it as PNG or JPEG")


def _converted(image: Image.Image, mode: Mode) -> Image.Image:
    try:
        image.load()
        converted = image.convert("RGB") if mode == "reference" else _to_rgb(image)
    except UserError as error:  # floating-point values out of their range
        raise ImageError("invalid_image", str(error)) from None
    except Exception as error:
        raise ImageError("image_parse_error", f"the picture is damaged or cut off ({shortened(str(error))})") from None
    converted.info = {}  # an orientation that was applied must not be found and applied again
    return converted


def _to_rgb(image: Image.Image) -> Image.Image:
    transpose = _UPRIGHT.get(_orientation(image))
    if image.mode == "F":
        image = _from_array(np.asarray(image))
    elif image.mode.startswith("I"):  # 16-bit samples, in some modes held by 32-bit integers
        image = _from_array(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))
    rgb = _on_white(image) if image.has_transparency_data else image.convert("RGB")
    return rgb if transpose is None else rgb.transpose(transpose)


def _on_white(image: Image.Image) -> Image.Image:
    """The picture over white, in bands of rows: Pillow lets no other thread run while it composites."""
    width, height = image.size
    rgb = Image.new("RGB", image.size)
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata does not make a picture unreadable
        return 1


def _from_array(array: np.ndarray) -> Image.Image:
    """An array by the rule of `load_image` to a PIL image of mode L, RGB or RGBA."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)):
        raise UserError(f"an array of shape {list(array.shape)} is no picture; use [H, W], [H, W, 3] or [H, W, 4]")
    if 0 in array.shape:
        raise UserError(f"an array of shape {list(array.shape)} has no pixels")
    if array.dtype == np.uint16:
        # x / 257 to the nearest, since 65535 = 255 * 257, without wider numbers: such pictures are large as they are
        array = (array // 257 + (array % 257 > 128)).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
            raise UserError(f"floating-point pixels must lie in 0..1; these lie in {array.min():g}..{array.max():g}")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UserError(f"pixels of dtype {array.dtype} are ambiguous; use uint8, uint16 or floating point in 0..1")
    return Image.fromarray(np.ascontiguousarray(array))


def _read(path: str | os.PathLike) -> bytes:
    try:
        path = Path(path)
        if path.is_dir():
            raise UserError(f"{path}: a folder, not a picture file")
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise UserError(f"{path}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shortened(str(path))}: cannot be read ({reason})") from None


def _fetch(url: str, allow_url: bool) -> bytes:
    scheme = url.split("://", 1)[0].lower()
    if scheme not in ("http", "https"):
        raise UserError(
            f"{shortened(url)}: the scheme {shortened(scheme)!r} is not supported; use a path, a data URI or http(s)"
        )
    if not allow_url:
        raise UserError(f"{shortened(url)}: URLs are not fetched here; allow them (allow_url=True) or give the file")
    return download(url)
