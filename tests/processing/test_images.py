"""Loading pictures from every source and mode, and the network input bit for bit."""

import base64
import io
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import golden_folder
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing import images
from qwenvl_jax.processing.image_errors import ImageError
from qwenvl_jax.processing.images import image_size, load_image, picture_key, preprocess

TESTS = Path(__file__).parents[1]
PICTURES = sorted((TESTS / "fixtures" / "images").iterdir())
E2E = TESTS / "golden" / "fixtures" / "e2e.npz"
GOLDENS = sorted(golden_folder().glob("*.npz"))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(source, **options) -> np.ndarray:
    return np.asarray(load_image(source, **options))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_network_input_of_the_goldens_is_bit_exact(path):
    with np.load(path) as golden:
        pictures = [golden[name] for name in sorted(name for name in golden.files if name.startswith("image_"))]
        if not pictures:
            assert "vis/pixels" not in golden.files
            return
        expected = golden["vis/pixels"]
    result = preprocess([load_image(picture) for picture in pictures], expected.shape[-1])
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_goldens_were_found():
    assert GOLDENS


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_files_in_reference_mode_equal_the_original(path):
    with np.load(E2E) as golden:
        rgb, pixels = golden[f"image/{path.name}/rgb"], golden[f"image/{path.name}/pixels"]
    loaded = load_image(path, mode="reference")
    if path.suffix == ".png":
        np.testing.assert_array_equal(np.asarray(loaded), rgb)
    else:  # JPEG decoders differ in the last bit
        assert np.abs(np.asarray(loaded).astype(int) - rgb).max() <= 1
    np.testing.assert_array_equal(preprocess([Image.fromarray(rgb)], pixels.shape[-1])[0], pixels)


def test_no_pictures_make_an_empty_batch():
    assert preprocess([], 14).shape == (0, 3, 14, 14)


def test_every_source_gives_the_same_picture(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(rgb))
    path = tmp_path / "图.png"
    path.write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    sources = [path, str(path), content, bytearray(content), memoryview(content), uri, Image.fromarray(rgb), rgb]
    for source in sources:
        np.testing.assert_array_equal(pixels_of(source), rgb)


def test_the_source_is_not_changed():
    image = Image.new("RGB", (4, 4), "red")
    load_image(image).putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 255]], np.uint8), [0, 255]),
        (np.array([[[0], [7]]], np.uint8), [0, 7]),
        (np.array([[0.0, 1.0, 0.5]], np.float32), [0, 255, 128]),
        (np.array([[0, 65535, 257, 32896]], np.uint16), [0, 255, 1, 128]),
    ],
)
def test_grey_arrays(array, expected):
    np.testing.assert_array_equal(pixels_of(array), np.repeat(np.array(expected, np.uint8)[None, :, None], 3, axis=2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.int64), "dtype int64 are ambiguous"),
        (np.zeros((2, 2), bool), "dtype bool are ambiguous"),
        (np.full((2, 2), 255.0), r"must lie in 0\.\.1; these lie in 255\.\.255"),
        (np.array([[0.0, np.nan]]), r"must lie in 0\.\.1"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\] is no picture"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.zeros(8, np.uint8), r"shape \[8\] is no picture"),
    ],
)
def test_arrays_that_are_refused(array, message):
    with pytest.raises(UserError, match=message):
        load_image(array)


def test_transparency_is_composited_on_white_and_dropped_in_reference_mode():
    half_red = Image.new("RGBA", (1, 1), (255, 0, 0, 51))
    assert load_image(encoded(half_red)).getpixel((0, 0)) == (255, 204, 204)
    assert load_image(encoded(half_red), mode="reference").getpixel((0, 0)) == (255, 0, 0)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert load_image(encoded(grey)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([10] * 768)
    assert load_image(encoded(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(palette)).getpixel((0, 0)) == (10, 10, 10)


def test_sixteen_bits_are_scaled_where_the_original_clips():
    grey = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    for content in (encoded(grey), encoded(grey, "TIFF")):
        np.testing.assert_array_equal(pixels_of(content)[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(pixels_of(encoded(grey), mode="reference")[0, :, 0], [0, 255, 255, 255])
    wide = Image.fromarray(np.array([[0, 65535, 70000, -5]], np.int32))
    np.testing.assert_array_equal(pixels_of(wide)[0, :, 0], [0, 255, 255, 0])
    real = Image.fromarray(np.array([[0.0, 1.0]], np.float32))
    np.testing.assert_array_equal(pixels_of(real)[0, :, 0], [0, 255])


def test_cmyk_one_bit_and_palette_become_rgb():
    cmyk = Image.new("CMYK", (2, 1), (0, 255, 255, 0))
    red, green, blue = load_image(encoded(cmyk, "JPEG")).getpixel((0, 0))
    assert red > 200
    assert green < 60
    assert blue < 60
    assert load_image(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)).quantize(), "GIF")).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_ignored_in_reference_mode(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # How a camera stores the upright picture in each orientation (EXIF: where row 0 and column 0 lie).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels_of(content)[..., 0], upright)
    np.testing.assert_array_equal(pixels_of(content, mode="reference")[..., 0], stored)
    for mode, expected in (("default", upright), ("reference", stored)):  # loading what was loaded changes nothing
        np.testing.assert_array_equal(pixels_of(load_image(content, mode=mode))[..., 0], expected)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
        assert image_size(content) == load_image(content).size == (3, 2)


def test_the_size_is_known_without_the_pixels(tmp_path):
    image = Image.effect_noise((300, 200), 50)
    cut = encoded(image, "JPEG")[:2000]
    assert image_size(cut) == (300, 200)
    with pytest.raises(UserError, match="damaged or cut off"):
        load_image(cut)
    (tmp_path / "a.png").write_bytes(encoded(image))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, np.zeros((200, 300), np.uint8)):
        assert image_size(source) == (300, 200)
    with pytest.raises(UserError, match="no such file"):
        image_size(tmp_path / "b.png")
    with pytest.raises(UserError, match="URLs are not fetched here"):
        image_size("https://host/a.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_matter():
    content = encoded(Image.new("RGB", (2, 2), "blue"), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(content).size == (2, 2)


def test_files_that_are_no_pictures(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, message in [
        (tmp_path / "absent.png", "no such file"),
        (tmp_path, "a folder, not a picture file"),
        (text, "not a picture in a format"),
        (cut, "damaged or cut off"),
        (empty, "empty, not a picture"),
        (Path("/dev/null"), "not a regular file"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_with_a_nul_is_refused():
    with pytest.raises(UserError, match="cannot be read"):
        load_image("a\0b.png")


def test_formats_that_start_other_programs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="not a picture in a format"):
        load_image(postscript)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any data, as a decompression bomb does."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header():
    for width, height in [(10_000, 10_000), (60_000, 60_000)]:
        with pytest.raises(UserError, match=f"more than {images.MAX_PIXELS:,} pixels"):
            load_image(png_header(width, height))
    with pytest.raises(UserError, match="damaged or cut off"):  # a size below the limit reaches the decoder
        load_image(png_header(100, 100))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(UserError, match="0 x 5 pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png;base64,%%%", "the base64 is damaged"),
        ("data:image/png,rawtext", "only data URIs of the form"),
        ("data:image/png;base64", "only data URIs of the form"),
        ("data:image/png;base64,aGVsbG8=", "not a picture in a format"),
        ("http://example.com/a.png", "URLs are not fetched here"),
        ("https://example.com/a.png", "URLs are not fetched here"),
        ("ftp://example.com/a.png", "the scheme 'ftp' is not supported"),
        ("file:///etc/passwd", "the scheme 'file' is not supported"),
        (None, "no picture: NoneType"),
        (3, "no picture: int"),
        ([1, 2], "no picture: list"),
    ],
)
def test_sources_that_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        load_image(source)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="mode 'fast' does not exist"):
        load_image(Image.new("RGB", (2, 2)), mode="fast")


def test_errors_of_pictures_have_a_code_and_survive_a_process_border(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.png")
    error = pickle.loads(pickle.dumps(caught.value.at("record 3")))
    assert (error.code, error.where) == ("invalid_image_format", f"record 3: {tmp_path / 'a.png'}")
    assert str(error) == f"record 3: {tmp_path / 'a.png'}: {caught.value.reason}"


def test_sides_of_millions_are_refused_though_the_pixels_are_few():
    with pytest.raises(ImageError, match="a side above 65,535 pixels"):
        load_image(png_header(1, 10_000_000))


def test_every_sixteen_bit_value_is_rounded_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (values.astype(np.uint32) * 255 + 32767) // 65535
    np.testing.assert_array_equal(pixels_of(values)[..., 0], expected)


def test_transparency_in_a_picture_of_several_bands():
    dice = np.random.default_rng(0)
    image = Image.fromarray(dice.integers(0, 256, (1100, 2000, 4), dtype=np.uint8))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    np.testing.assert_array_equal(pixels_of(image), np.asarray(white))
    palette = image.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), palette.convert("RGBA")).convert("RGB")
    np.testing.assert_array_equal(pixels_of(palette), np.asarray(white))


def test_picture_keys_differ_where_anything_the_network_sees_does():
    pixels = np.random.default_rng(0).normal(size=(3, 14, 14)).astype(np.float32)
    same = [pixels, pixels.copy(), np.asfortranarray(pixels), np.stack([pixels, pixels], -1)[..., 0]]
    assert {picture_key(array) for array in same} == {picture_key(pixels)}
    assert len(picture_key(pixels)) == 32
    nearly = pixels.copy()
    nearly[-1, -1, -1] = np.nextafter(nearly[-1, -1, -1], np.float32(9))
    others = [
        nearly,
        pixels.reshape(3, 7, 28),
        pixels.view(np.int32),
        pixels.view(">f4"),
        pixels.view(ml_dtypes.bfloat16),
    ]
    assert len({picture_key(array) for array in [pixels, *others]}) == 6
