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

import base64
import binascii
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.download import download

MAX_PIXELS = 89_478_485  # width x height; where Pillow, too, begins to suspect a decompression bomb (256 MiB as RGB)
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

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray
Mode = Literal["default", "reference"]


def load_image(source: ImageSource, *, allow_url: bool = False, mode: Mode = "default") -> Image.Image:
    """The picture at `source` as a PIL image of mode RGB.

    `source` is a path, the bytes of a picture file, a `data:` URI, a PIL image, an array, or, with `allow_url`, an
    http(s) URL. Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha), and uint8, uint16 (65535 is white) or
    floating point from 0 to 1. `mode` chooses the conversion, see the head of this file. Raises UserError naming the
    source when it is missing, a folder, no picture, truncated, empty or larger than MAX_PIXELS.
    """
    image, name = _opened(source, allow_url)
    return _convert(image, mode, name)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of `load_image(source)`, from the file's head, unless the picture lies on its side.

    Raises UserError as `load_image` does, though damage behind the head may go unseen.
    """
    image, name = _opened(source, allow_url=False)
    size = _checked_size(image, name)
    # Formats differ in whether Pillow turns such a picture by itself, so only its pixels tell.
    return _convert(image, "default", name).size if _orientation(image) in (5, 6, 7, 8) else size


def _opened(source: ImageSource, allow_url: bool) -> tuple[Image.Image, str]:
    """The picture with nothing but its head read, where it comes from a file, and its name in error messages."""
    if isinstance(source, str) and source.startswith("data:"):
        name, content = _short(source), _data_uri_bytes(source)
    elif isinstance(source, str) and "://" in source:
        name, content = _short(source), _fetch(source, allow_url)
    elif isinstance(source, str | os.PathLike):
        name, content = os.fspath(source), _read(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        name, content = f"the picture of {len(source)} bytes", bytes(source)
    elif isinstance(source, Image.Image):
        return source, "the PIL image"
    elif hasattr(source, "__array__"):
        return _from_array(np.asarray(source)), "the array"
    else:
        raise UserError(
            f"no picture: {type(source).__name__}; use a path, bytes, a data URI, a URL, a PIL image or an array"
        )
    return _decode(content, name), name


def preprocess(images: Sequence[Image.Image], image_size: int) -> np.ndarray:
    """The network's input: float32 [I, 3, S, S] with S = `image_size`, bit for bit that of the original on Pillow 13.

    Each RGB picture is resized to a square by Pillow's bicubic filter (the aspect ratio is not kept), scaled to 0..1
    and normalised with CLIP's mean and standard deviation.
    """
    pixels = np.empty((len(images), 3, image_size, image_size), np.float32)
    for row, image in enumerate(images):
        scaled = np.asarray(_square(image, image_size), np.float32) / np.float32(255)
        pixels[row] = ((scaled - MEAN) / STANDARD_DEVIATION).transpose(2, 0, 1)
    return pixels


def _square(image: Image.Image, side: int) -> Image.Image:
    """Pillow's bicubic resize in two calls, one for each axis, which fixes their order.

    Each pass rounds to 8 bits, so the order shows. Pillow before 13 goes along the rows first; 13 goes along the
    columns first where the height shrinks more than twice as much as the width, and the golden values come from it.
    """
    width, height = image.size
    columns_first = height > side and height - side > 2 * (width - side)
    between = (width, side) if columns_first else (side, height)
    return image.resize(between, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)


def _decode(content: bytes, name: str) -> Image.Image:
    """Bytes of a file to a picture, not yet loaded. Pillow raises nearly anything on hostile bytes: a broad except."""
    if not content:
        raise UserError(f"{name}: empty, not a picture")
    try:
        Image.init()  # with `formats`, Pillow looks only among the formats registered so far
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception:
        raise UserError(f"{name}: not a picture in a format that is read here ({', '.join(FORMATS)})") from None


def _convert(image: Image.Image, mode: Mode, name: str) -> Image.Image:
    if mode not in ("default", "reference"):
        raise UserError(f"mode {mode!r} does not exist; use 'default' or 'reference'")
    _checked_size(image, name)
    try:
        image.load()
        converted = image.convert("RGB") if mode == "reference" else _to_rgb(image)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:
        raise UserError(f"{name}: the picture is damaged or cut off ({error})") from None
    converted.info = {}  # an orientation that was applied must not be found and applied again
    return converted


def _checked_size(image: Image.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    if not width or not height:
        raise UserError(f"{name}: a picture of {width} x {height} pixels has nothing to see")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width} x {height} is more than {MAX_PIXELS:,} pixels; make it smaller")
    return width, height


def _to_rgb(image: Image.Image) -> Image.Image:
    transpose = _UPRIGHT.get(_orientation(image))
    if image.mode == "F":
        image = _from_array(np.asarray(image))
    elif image.mode.startswith("I"):  # 16-bit samples, in some modes held by 32-bit integers
        image = _from_array(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    return rgb if transpose is None else rgb.transpose(transpose)


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
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
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
        raise UserError(f"{_short(str(path))}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _fetch(url: str, allow_url: bool) -> bytes:
    scheme = url.split("://", 1)[0].lower()
    if scheme not in ("http", "https"):
        raise UserError(f"{_short(url)}: the scheme {scheme!r} is not supported; use a path, a data URI or http(s)")
    if not allow_url:
        raise UserError(f"{_short(url)}: URLs are not fetched here; allow them (allow_url=True) or give the file")
    return download(url)


def _data_uri_bytes(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise UserError(f"{_short(uri)}: only data URIs of the form data:image/png;base64,... are read")
    try:
        return base64.b64decode(re.sub(r"\s", "", body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{_short(uri)}: the base64 is damaged ({error})") from None


def _short(text: str) -> str:
    """For error messages: a data URI or a URL can be megabytes long."""
    return text if len(text) <= 80 else text[:60] + "..."
