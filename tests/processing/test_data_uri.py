"""Which data URIs are read, and how those that are not are refused."""

import base64
import random

import pytest

from qwenvl_jax.processing import data_uri
from qwenvl_jax.processing.data_uri import data_uri_bytes, is_data_uri
from qwenvl_jax.processing.image_errors import ImageError

CONTENT = random.Random(0).randbytes(100)
BASE64 = base64.b64encode(CONTENT).decode()
assert BASE64.endswith("==")
assert "+" in BASE64 or "/" in BASE64


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:IMAGE/PNG;BASE64,{BASE64}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{BASE64}",
        f"data:image/png;base64;charset=utf-8,{BASE64}",
        f"data: image/png ; base64 ,{BASE64}",
        f"data:image/x-whatever;base64,{BASE64}",
        f"data:application/octet-stream;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        "data:image/png;base64," + "\r\n".join(BASE64[at : at + 20] for at in range(0, len(BASE64), 20)) + "\n",
        "data:image/png;base64, " + " \t".join(BASE64),
        "data:image/png;base64," + BASE64.rstrip("="),
        "data:image/png;base64," + base64.urlsafe_b64encode(CONTENT).decode(),
    ],
)
def test_forms_that_are_read(uri):
    assert is_data_uri(uri)
    assert data_uri_bytes(uri) == CONTENT


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        (f"data:image/png,{BASE64}", "invalid_base64_image"),
        (f"data:image/png;base64{BASE64}", "invalid_base64_image"),
        (f"data:image/png;name={'x' * 2000};base64,{BASE64}", "invalid_base64_image"),
        ("data:", "invalid_base64_image"),
        (f"data:text/html;base64,{BASE64}", "unsupported_image_media_type"),
        (f"data:application/pdf;base64,{BASE64}", "unsupported_image_media_type"),
        (f"data:images/png;base64,{BASE64}", "unsupported_image_media_type"),
        ("data:image/png;base64,QUJD%3D", "invalid_base64_image"),
        ("data:image/png;base64,QUJDR", "invalid_base64_image"),
        ("data:image/png;base64,QQ==QUJD", "invalid_base64_image"),
        ("data:image/png;base64,=QUJ", "invalid_base64_image"),
        ("data:image/png;base64,QUJD\0", "invalid_base64_image"),
        ("data:image/png;base64,QUJDé", "invalid_base64_image"),
    ],
)
def test_forms_that_are_refused(uri, code):
    with pytest.raises(ImageError) as caught:
        data_uri_bytes(uri)
    assert caught.value.code == code
    assert len(str(caught.value)) < 200


def test_nothing_is_an_empty_picture():
    assert data_uri_bytes("data:image/png;base64,") == b""


def test_slices_join_wherever_they_fall(monkeypatch):
    spaced = "".join(letter + " " * (number % 3) for number, letter in enumerate(BASE64))
    for size in range(1, 40):
        monkeypatch.setattr(data_uri, "_SLICE", size)
        assert data_uri_bytes(f"data:image/png;base64,{spaced}") == CONTENT
        for wrong in ("QQ==QUJD" * 9, "QUJDRA==" + " " * 50 + "Q", BASE64[:-3]):
            with pytest.raises(ImageError, match="base64 is damaged"):
                data_uri_bytes(f"data:image/png;base64,{wrong}")


def test_decoding_stops_at_the_limit():
    assert data_uri_bytes(f"data:image/png;base64,{BASE64}", len(CONTENT)) == CONTENT
    with pytest.raises(ImageError, match="more than 99 bytes") as caught:
        data_uri_bytes(f"data:image/png;base64,{BASE64}", len(CONTENT) - 1)
    assert caught.value.code == "image_file_too_large"
