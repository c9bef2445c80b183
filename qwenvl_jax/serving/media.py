"""The pictures of requests: from the `url` of a message part to RGB pixels, for clients that nobody trusts.

What a picture is, how it becomes RGB and which data URIs are read is stated in `processing/images.py` and
`processing/data_uri.py`, how URLs are guarded in `processing/download.py`; here are a server's limits and which sources
it takes at all:

  - `data:` URIs with one of FORMATS, whatever type they declare, as long as it is a picture's
  - http(s) URLs, where the server allows them, from the hosts that it allows, at every redirect
  - nothing else: no path, no `file:`, `ftp:` or other scheme, no bare base64. No client's text opens a file

Of an animation the first frame is decoded and the others are not looked at. What a client learns of a failure is a
code, and a sentence of bounded length without the server's paths and with no more than a few words of its own.
"""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator
from typing import IO, Any

from PIL import Image, TiffImagePlugin

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.data_uri import data_uri_bytes, is_data_uri
from qwenvl_jax.processing.download import DownloadLimits, download, host_name
from qwenvl_jax.processing.image_errors import ImageError, shortened
from qwenvl_jax.processing.images import MAX_PIXELS, decode_image

# Those that clients send. Left out: what has no mark at its start (TGA takes nearly anything), what hides its true size
# (ICO) and what decodes slowly (JPEG 2000, plain PPM).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_LONGEST_MESSAGE = 300
_MOST_TAG_BYTES = 4 * 2**20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}(?=:)")


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """Of one picture. max_bytes: its file. max_pixels: width times height; decoding takes up to 16 bytes for each."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    download_seconds: float = 15

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= MAX_PIXELS:
            raise UserError(f"max_pixels is {self.max_pixels}; it must lie in 1..{MAX_PIXELS}")


class ImageLoader:
    """Loads the pictures of message parts; a processor's `load`. Blocks, and may be called from several threads.

    allowed_hosts: exact names of the hosts that URLs may lead to, redirects included; empty for every public host.
    Raises UserError for a name that is none. Two things change for Pillow in the whole process: its warnings are not
    heard (they quote files, and Python remembers each that differs for good), and it reads tags within a bound.
    """

    def __init__(
        self, limits: ImageLimits | None = None, allow_urls: bool = False, allowed_hosts: tuple[str, ...] = ()
    ):
        self.limits = limits or ImageLimits()
        self.allow_urls = allow_urls
        try:
            hosts = tuple(map(host_name, allowed_hosts))
        except ValueError as error:
            raise UserError(f"allowed_hosts: {error}; give names such as images.example.com") from None
        self._download_limits = DownloadLimits(
            self.limits.max_bytes, seconds_in_all=self.limits.download_seconds, allowed_hosts=hosts
        )
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _bound_tags()

    def __call__(self, source: str | bytes | Image.Image) -> Image.Image:
        """The RGB picture behind a URL, in the bytes of a file that is already here, or that this gave before.

        Raises ImageError.
        """
        if isinstance(source, Image.Image):
            return source
        content = self.content(source)
        with _without_source():
            return decode_image(content, formats=FORMATS, max_pixels=self.limits.max_pixels)

    def content(self, source: str | bytes) -> bytes:
        """The bytes of a picture's file, wherever they come from, not looked at. Raises ImageError."""
        with _without_source():
            return self._content(source)

    def _content(self, source: str | bytes) -> bytes:
        if isinstance(source, bytes):
            if len(source) > self.limits.max_bytes:
                raise ImageError("image_file_too_large", f"more than {self.limits.max_bytes:,} bytes")
            return source
        if not isinstance(source, str):
            raise ImageError("invalid_image_url", f"a picture's url must be a string, not {type(source).__name__}")
        url = source.strip()
        if is_data_uri(url):
            return data_uri_bytes(url, self.limits.max_bytes)
        scheme = _SCHEME.match(url)
        if not scheme or scheme[0].lower() not in ("http", "https"):
            raise ImageError(
                "invalid_image_url",
                f"{shortened(url, 30)!r} is not a URL that is read here; send data:image/png;base64,... "
                + ("or an http(s) URL" if self.allow_urls else "with the picture"),
            )
        if not self.allow_urls:
            raise ImageError(
                "invalid_image_url", "this server fetches no URLs; send the picture as data:image/png;base64,..."
            )
        return download(url, self._download_limits)


@contextlib.contextmanager
def _without_source() -> Iterator[None]:
    """Errors do not name the source: whoever called knows where that stands."""
    try:
        yield
    except ImageError as error:
        raise ImageError(error.code, shortened(error.reason, _LONGEST_MESSAGE)) from None


class _TagFile:
    """A file that TIFF or EXIF tags are read from, up to a number of bytes in all."""

    def __init__(self, file: IO[bytes]):
        self.left = _MOST_TAG_BYTES
        self.seek = file.seek
        self.tell = file.tell
        self._read = file.read

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise OSError("too many tags")  # which Pillow takes for the end of them
        return self._read(size)


@functools.cache
def _bound_tags() -> None:
    """Sets a bound to the bytes that Pillow keeps of a directory of tags.

    Each of up to 65,535 tags may claim the same megabytes of the file, and Pillow copies them for each. Every format
    can carry such a directory, as EXIF, and it is read while the file is opened: no check outside of Pillow comes
    before it in all of them.
    """
    load = TiffImagePlugin.ImageFileDirectory_v2.load

    def bounded(self: TiffImagePlugin.ImageFileDirectory_v2, file: Any) -> None:
        load(self, _TagFile(file))  # type: ignore[arg-type]

    TiffImagePlugin.ImageFileDirectory_v2.load = bounded  # type: ignore[assignment, method-assign]
