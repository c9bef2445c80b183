"""Pictures of the page's visitors: checked when they come, shown from Gradio's cache, sent as data URIs."""

import base64
import dataclasses
import io
import secrets
import urllib.parse
from pathlib import Path

from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.download import DownloadLimits, download
from qwenvl_jax.processing.images import load_image

MOST_BYTES = 10 * 2**20  # of a picture that is uploaded or fetched
MOST_PICTURES = 8  # in a conversation: what the server takes in a request
SIDE = 2048  # pixels; larger pictures are sent reduced to this, since no model here sees more of them
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}  # every browser's


@dataclasses.dataclass(frozen=True)
class Picture:
    """A file in Gradio's cache, which is deleted a day after it came. Sizes are of the upright picture in pixels."""

    path: str
    name: str
    width: int
    height: int

    @property
    def url(self) -> str:
        """Where the browser finds it."""
        return "/gradio_api/file=" + urllib.parse.quote(self.path)


def accept(path: str, name: str | None = None) -> Picture:
    """The picture in an uploaded file. Raises UserError naming it where it is none.

    What a browser cannot show (TIFF, an animation's later frames, camera files turned by EXIF) becomes a PNG beside it.
    """
    name = name or Path(path).name
    if Path(path).stat().st_size > MOST_BYTES:
        raise UserError(f"{name}: larger than {MOST_BYTES // 2**20} MB; make it smaller")
    try:
        picture = load_image(path)
        with Image.open(path) as stored:
            plain = stored.format in TYPES and stored.size == picture.size and not getattr(stored, "is_animated", False)
            plain = plain and stored.getexif().get(0x0112, 1) == 1  # upright as it is stored
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from None  # the visitor knows no other name
    if not plain:
        path = str(Path(path).with_name(f"{Path(path).stem}-{secrets.token_hex(4)}.png"))
        picture.save(path)
    return Picture(path, name, *picture.size)


def fetch(url: str, folder: Path) -> Path:
    """The file of the picture behind an http(s) URL, in `folder`. Raises UserError.

    Names that lead into the own network are refused, see `processing/download.py`.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UserError("the address must begin with http:// or https://")
    body = download(url, DownloadLimits(max_bytes=MOST_BYTES))
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    path = folder / ("".join(c for c in name if c.isalnum() or c in "-_.")[-80:].lstrip(".") or "picture")
    path.write_bytes(body)
    return path


def sent_size(picture: Picture) -> tuple[int, int]:
    """Width and height of what `data_uri` sends, in pixels."""
    scale = min(1.0, SIDE / max(picture.width, picture.height))
    return max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)


def data_uri(picture: Picture) -> str:
    """The picture for a request: the file itself, or a JPEG of at most SIDE pixels. Raises UserError if it is gone."""
    size = sent_size(picture)
    try:
        if size == (picture.width, picture.height):
            data = Path(picture.path).read_bytes()
            with Image.open(picture.path) as stored:
                kind = TYPES[stored.format or ""]
        else:
            written = io.BytesIO()
            load_image(picture.path).resize(size, Image.Resampling.LANCZOS).save(written, "JPEG", quality=95)
            data, kind = written.getvalue(), TYPES["JPEG"]
    except OSError:
        raise UserError(f"{picture.name} is no longer kept here; start anew and add it again") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
