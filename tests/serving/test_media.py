"""The server's picture loader: what it takes, what it refuses and with which code, on hostile files within bounds.

No test can leave the machine: where URLs are allowed, the socket layer is replaced.
"""

import base64
import ctypes
import hashlib
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving.malformed_pictures import pictures, png, whole_pictures

from qwenvl_jax.config import UserError
from qwenvl_jax.processing.image_errors import ImageError
from qwenvl_jax.processing.images import load_image
from qwenvl_jax.processing.messages import read_messages
from qwenvl_jax.serving.media import ImageLimits, ImageLoader

PICTURES = list(pictures())
STATUS = Path("/proc/self/status")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def code_of(source, loader: ImageLoader | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        (loader or ImageLoader())(source)
    message = str(caught.value)
    assert 0 < len(message.encode()) <= 400
    assert "0x" not in message  # no object's address
    assert message.isprintable()
    return caught.value.code


def memory(field: str) -> int:
    """VmRSS or VmHWM, the peak since it was reset, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def test_the_collection_is_large_and_the_same_at_every_call():
    assert len({name for name, _ in PICTURES}) == len(PICTURES) >= 200
    digests = [hashlib.sha256(content).digest() for _, content in PICTURES]
    assert [hashlib.sha256(content).digest() for _, content in pictures()] == digests


def test_every_malformed_picture_gives_a_picture_or_a_refusal_within_bounds():
    loader = ImageLoader()
    loader(PICTURES[0][1])
    for name, content in PICTURES:
        if STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what is taken now
            Path("/proc/self/clear_refs").write_text("5")
            before = memory("VmRSS")
        start = time.thread_time()  # of this thread, whatever else the machine does
        try:
            image = loader(content)
            assert image.mode == "RGB", name
            pixels = image.size[0] * image.size[1]
            message = ""
        except ImageError as error:
            pixels, message = 0, str(error)
        assert len(message) < 400, name
        assert message.isprintable(), name
        assert time.thread_time() - start < 2, name
        if STATUS.exists():
            # A refusal may come after room was made for as many pixels as are allowed.
            assert memory("VmHWM") - before < 256 * 2**20 + 16 * pixels, name


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("empty", "empty_image_file"),
        ("svg", "unsupported_image_media_type"),
        ("svg-with-declaration", "unsupported_image_media_type"),
        ("html-behind-blanks", "unsupported_image_media_type"),
        ("pdf", "unsupported_image_media_type"),
        ("postscript", "unsupported_image_media_type"),
        ("postscript-in-dos-clothes", "unsupported_image_media_type"),
        ("text", "invalid_image_format"),
        ("noise", "invalid_image_format"),
        ("tga", "invalid_image_format"),
        ("ico", "invalid_image_format"),
        ("png-cut-to-20", "image_parse_error"),
        ("jpeg-cut-to-20", "image_parse_error"),
        ("png-text-bomb", "image_parse_error"),
        ("png-wrong-checksum", "image_parse_error"),
        ("png-claims-65535x65535", "image_too_large"),
        ("png-claims-1x40000000", "image_too_large"),
        ("png-inflates-to-10000x10000", "image_too_large"),
        ("webp-claims-a-giant-canvas", "image_too_large"),
        ("tiff-giant-tiles", "image_too_large"),
        ("bmp-run-lengths-bomb", "image_too_large"),
        ("jpeg-500-scans-of-36-megapixels", "image_parse_error"),
        ("gif-comment-of-100000-pieces", "image_parse_error"),
        ("tiff-floats-300.0", "invalid_image"),
        ("tiff-floats-nan", "invalid_image"),
    ],
)
def test_refusals_have_the_code_of_what_is_wrong(name, code):
    assert code_of(dict(PICTURES)[name]) == code


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif"])
def test_formats_cut_in_the_middle_are_refused(kind):
    content = dict(whole_pictures())[kind]
    assert code_of(content[: len(content) // 2]) == "image_parse_error"


@pytest.mark.parametrize(
    "name",
    ["png-1x1", "png-2x3", "png-1x5000", "gif-1000-frames", "webp-1000-frames", "png-200-frames", "jpeg-broken-exif",
     "png-broken-profile", "png-tags-of-same-megabyte", "avif-tags-of-same-megabyte", "jpeg-tags-of-same-megabyte"],
)  # fmt: skip
def test_unusual_pictures_that_are_read(name):
    assert ImageLoader()(dict(PICTURES)[name]).mode == "RGB"


@pytest.mark.parametrize("kind", [kind for kind, _ in whole_pictures()])
def test_pictures_come_as_load_image_gives_them_whatever_type_is_declared(kind):
    content = dict(whole_pictures())[kind]
    expected = np.asarray(load_image(content))
    for declared in ("png", "jpeg", "svg+xml", "x-anything"):
        np.testing.assert_array_equal(np.asarray(ImageLoader()(uri(content, declared))), expected)
    np.testing.assert_array_equal(np.asarray(ImageLoader()(content)), expected)


def test_a_long_animation_is_not_gone_through():
    content = dict(PICTURES)["gif-1000-frames"]
    assert np.asarray(ImageLoader()(content[:2000])).tolist() == np.asarray(ImageLoader()(content)).tolist()


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("file:///etc/passwd", "invalid_image_url"),
        ("FILE:/etc/passwd", "invalid_image_url"),
        ("ftp://example.com/a.png", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        (__file__, "invalid_image_url"),
        ("C:\\a.png", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("iVBORw0KGgo=", "invalid_image_url"),
        ("javascript:alert(1)", "invalid_image_url"),
        ("\ud800\x00\x1b" * 50, "invalid_image_url"),
        ("http://example.com/a.png", "invalid_image_url"),
        ("blob:http://example.com/a", "invalid_image_url"),
        (None, "invalid_image_url"),
        ({"url": "x"}, "invalid_image_url"),
        ("data:text/html;base64,PGh0bWw+", "unsupported_image_media_type"),
        ("data:" + "x" * 2000, "invalid_base64_image"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png,raw", "invalid_base64_image"),
        ("data:image/png;base64,\ud800", "invalid_base64_image"),
    ],
)
def test_sources_that_are_refused(source, code):
    assert code_of(source) == code
    if code == "invalid_image_url" and not str(source).startswith("http:"):
        assert code_of(source, ImageLoader(allow_urls=True)) == code


def test_a_path_is_refused_alike_whether_or_not_it_exists(tmp_path):
    texts = set()
    for name in ("there.png", "away.png"):
        (tmp_path / "there.png").write_bytes(png(1, 1))
        with pytest.raises(ImageError) as caught:
            ImageLoader()(str(tmp_path / name))
        texts.add(str(caught.value).replace(name, ""))
    assert len(texts) == 1


def test_limits_hold_for_bytes_and_data_uris():
    content = encoded(Image.effect_noise((100, 100), 50))
    small = ImageLoader(ImageLimits(max_bytes=len(content) - 1))
    assert code_of(content, small) == code_of(uri(content), small) == "image_file_too_large"
    exact = ImageLoader(ImageLimits(max_bytes=len(content), max_pixels=10_000))
    assert exact(uri(content)).size == exact(content).size == (100, 100)
    assert code_of(content, ImageLoader(ImageLimits(max_pixels=9_999))) == "image_too_large"
    for pixels in (0, 10**9):
        with pytest.raises(UserError, match="max_pixels"):
            ImageLimits(max_pixels=pixels)


def test_orientation_and_transparency_follow_the_rule_of_all_pictures():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert ImageLoader()(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)
    assert ImageLoader()(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 51)))).getpixel((0, 0)) == (255, 204, 204)


def test_several_threads_share_a_loader():
    loader = ImageLoader()
    sources = [uri(content) for _, content in whole_pictures()] * 8
    with ThreadPoolExecutor(8) as pool:
        together = [image.tobytes() for image in pool.map(loader, sources)]
    assert together == [loader(source).tobytes() for source in sources]


def test_a_message_part_keeps_the_code_and_gains_its_place():
    def loaded(part):
        message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
        return read_messages([message], ImageLoader(), "user")[1]

    content = encoded(Image.new("RGB", (3, 2)))
    (picture,) = loaded({"type": "image_url", "image_url": {"url": uri(content)}})
    assert picture.size == (3, 2)
    assert loaded({"type": "image", "image": content}) == [picture]
    assert loaded({"type": "image", "image": picture})[0] is picture
    with pytest.raises(ImageError) as caught:
        loaded({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!!"}})
    assert caught.value.code == "invalid_base64_image"
    assert caught.value.where == "messages[0].content[1].image_url.url"


@pytest.fixture
def answer(monkeypatch):
    """Every host is a public one, and every connection ends on this machine; set what comes back."""
    answers: list[bytes] = []
    asked: list[str] = []

    def connect(address, timeout):
        ours, theirs = socket.socketpair()
        theirs.sendall(answers[min(len(asked), len(answers)) - 1])
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(timeout)
        kept.append(theirs)
        return ours

    def look_up(host, port, **_):
        asked.append(host)
        return [(2, 1, 6, "", ("10.0.0.1" if host == "inner.example" else "93.184.216.34", port))]

    kept: list[socket.socket] = []
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    yield answers, asked
    for end in kept:
        end.close()


def test_urls_are_fetched_where_they_are_allowed(answer):
    answers, asked = answer
    answers.append(b"HTTP/1.1 200 OK\r\n\r\n" + encoded(Image.new("RGB", (3, 2))))
    assert ImageLoader(allow_urls=True)(" HTTP://a.example/a.png ").size == (3, 2)
    named = ImageLoader(allow_urls=True, allowed_hosts=("A.Example",))
    assert named("http://a.example./a.png").size == (3, 2)
    assert code_of("http://b.example/a.png", named) == "invalid_image_url"
    assert code_of("http://a.example/a.png") == "invalid_image_url"  # URLs are off unless asked for
    assert asked == ["a.example", "a.example"]
    for host in ("http://a", "a b", "", "a/b"):
        with pytest.raises(UserError, match="allowed_hosts"):
            ImageLoader(allow_urls=True, allowed_hosts=(host,))


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "failed_to_download_image"),
        (b"HTTP/1.1 500 Broken\r\n\r\n" + b"x" * 5000, "failed_to_download_image"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "empty_image_file"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "unsupported_image_media_type"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2000), "image_file_too_large"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://inner.example/\r\n\r\n", "invalid_image_url"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "invalid_image_url"),
        (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", "failed_to_download_image"),
        (b"no HTTP " + b"\xff\x1b[31m" * 100 + b"\r\n\r\n", "failed_to_download_image"),
        (b"", "failed_to_download_image"),
    ],
)
def test_downloads_that_fail(answer, response, code):
    answers, _ = answer
    answers.append(response)
    assert code_of("http://a.example/a.png", ImageLoader(ImageLimits(max_bytes=1000), allow_urls=True)) == code
