"""Pictures over HTTP: how they may be sent, what the model sees of them, their order, limits, and hostile files.

Whether two pictures are the same to the model is asked of its cache of features: equal pixels are a hit, others are
not. What the loader does with each kind of file is in `test_media.py`.
"""

import base64
import concurrent.futures
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from serving.malformed_pictures import pictures
from serving.process import ServerProcess, chat, check_error, encoded, picture, user

PATH = "/v1/chat/completions"
MALFORMED = dict(pictures())
URL = "messages.0.content.0.image_url.url"
dice = np.random.default_rng(0)


def noise(height: int = 30, width: int = 40, channels: int = 3) -> np.ndarray:
    """Pixels that no other test sends."""
    return dice.integers(0, 256, (height, width, channels), np.uint8)


def file(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def at(url: str, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.fixture
def look(server, post):
    """Asks about a picture: what is said of it, and whether its features were there already."""

    def asked(part: dict[str, Any]) -> tuple[Any, bool]:
        before = server.metric("mm_cache_hits_total")
        body = chat(messages=user([part, text("What is it?")]), max_tokens=3, logprobs=True, top_logprobs=3)
        response = post(body)
        assert response.status_code == 200, response.text[:500]
        tokens = response.json()["choices"][0]["logprobs"]["content"]
        answer = [(token["token"], round(token["logprob"], 2)) for token in tokens]
        return answer, server.metric("mm_cache_hits_total") > before

    return asked


@pytest.fixture
def same(look):
    """That files give the very pixels of the first one, and answers that are equal, too."""

    def check(first: dict[str, Any], *others: dict[str, Any]) -> None:
        answer, hit = look(first)
        assert not hit
        for number, other in enumerate(others):
            assert look(other) == (answer, True), number

    return check


def test_one_picture_in_many_formats(same):
    pixels = noise() // 85 * 85  # few enough colours for a GIF
    formats = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}
    gif = file(Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE), "GIF")
    same(*(encoded(file(pixels, kind, **options)) for kind, options in formats.items()), encoded(gif))


@pytest.mark.parametrize("name", ["jpeg", "progressive-jpeg", "webp", "avif"])
def test_lossy_formats(look, name):
    look(encoded(MALFORMED[name]))


def test_forms_of_data_uris_that_are_read(same):
    content = file(noise())
    digits = base64.b64encode(content).decode()
    lines = "\r\n".join(digits[start : start + 76] for start in range(0, len(digits), 76))
    same(
        at(f"data:image/png;base64,{digits}"),
        at(f"DATA:IMAGE/PNG;BASE64,{digits}"),
        at(f"data:image/png;charset=utf-8;name=a.png;base64,{digits}"),
        at(f"data:;base64,{digits}"),
        at(f"data:application/octet-stream;base64,{digits}"),
        at(f"data:image/jpeg;base64,{digits}"),  # the bytes say what they are
        at(f"data:image/svg+xml;base64,{digits}"),
        at(f"data:image/png;base64,{lines}\n"),
        at("data:image/png;base64," + base64.urlsafe_b64encode(content).decode()),
        at("data:image/png;base64," + digits.rstrip("=")),
    )


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png,iVBORw0KGgo", "invalid_base64_image"),
        ("data:image/png;base64,iVBORw0KGgo%3D", "invalid_base64_image"),
        ("data:image/png;base64,!!!!", "invalid_base64_image"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:text/html;base64,PGh0bWw+", "unsupported_image_media_type"),
        ("iVBORw0KGgo=", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://127.0.0.1:1/a.png", "invalid_image_url"),
    ],
)
def test_urls_that_are_refused(server, post, url, code):
    before = server.metric("image_rejected_total", code=code)
    message = check_error(post(chat(messages=user([at(url)]))), 400, code, URL)
    assert "passwd" not in message or url in message
    assert server.metric("image_rejected_total", code=code) == before + 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("jpeg-cut-to-20", "image_parse_error"),
        ("png-cut-to-40", "image_parse_error"),
        ("empty", "empty_image_file"),
        ("html", "unsupported_image_media_type"),
        ("svg", "unsupported_image_media_type"),
        ("pdf", "unsupported_image_media_type"),
        ("postscript", "unsupported_image_media_type"),
        ("png-claims-65535x65535", "image_too_large"),
        ("png-inflates-to-10000x10000", "image_too_large"),
        ("png-claims-0x0", "image_parse_error"),
        ("png-claims-0x10", "image_parse_error"),
        ("png-text-bomb", "image_parse_error"),
        ("tiff-floats-nan", "invalid_image"),
    ],
)
def test_files_that_are_refused(post, name, code):
    began = time.monotonic()
    check_error(post(chat(messages=user([encoded(MALFORMED[name])]))), 400, code, URL)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (10, 10), (1, 5000), (5000, 1)], ids=str)
def test_any_shape_is_seen_at_the_models_size(post, size):
    usage = post(chat(messages=user([picture("teal", size)]), max_tokens=1)).json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 64


def test_modes_become_rgb_by_the_stated_rule(same):
    """Each beside an RGB file with the pixels that the rule gives, computed here."""
    colour, grey, alpha = noise(), noise(channels=1)[..., 0], noise(channels=1)[..., 0]
    deep = grey.astype(np.uint16) * 257
    ink = Image.fromarray(noise(channels=4), "CMYK")
    palette = Image.fromarray(colour).quantize(32)
    black = grey > 127

    def of_grey(values: np.ndarray) -> bytes:
        return file(np.repeat(values.astype(np.uint8)[..., None], 3, 2))

    def on_white(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.dstack([pixels, alpha]), "RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]

    transparent = bytes([0, *[255] * 31])
    shown = np.asarray(palette.convert("RGB")).copy()
    shown[np.asarray(palette) == 0] = 255
    pairs = [
        (of_grey(grey), file(grey)),
        (of_grey(black * 255), file(Image.fromarray(black))),
        (of_grey(grey // 2), file(Image.fromarray((grey // 2).astype(np.uint16) * 257))),
        (file(on_white(colour)), file(np.dstack([colour, alpha]))),
        (file(on_white(np.dstack([deep // 257] * 3).astype(np.uint8))), file(np.dstack([grey, alpha]))),
        (file(np.asarray(palette.convert("RGB"))), file(palette)),
        (file(shown), file(palette, transparency=transparent)),
        (file(np.asarray(ink.convert("RGB"))), file(ink, "TIFF")),
        (of_grey(255 - grey), file(Image.fromarray((255 - grey).astype(np.float32) / 255), "TIFF")),
    ]
    for expected, sent in pairs:
        same(encoded(expected), encoded(sent))


def test_pictures_are_turned_upright(same):
    """By each of EXIF's orientations: the stored pixels, and what a viewer shows."""
    stored = noise()
    shown = {
        1: stored,
        2: np.fliplr(stored),
        3: np.rot90(stored, 2),
        4: np.flipud(stored),
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }
    for orientation, upright in shown.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        same(encoded(file(np.ascontiguousarray(upright))), encoded(file(stored, exif=exif)))


def test_the_first_frame_counts_and_profiles_do_not(same):
    first, second = (Image.fromarray(noise()).quantize(64) for _ in range(2))
    still = np.asarray(first.convert("RGB"))
    animated = file(first, "GIF", save_all=True, append_images=[second])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    moving = file(Image.fromarray(still), "WEBP", lossless=True, save_all=True, append_images=[second.convert("RGB")])
    same(encoded(file(still)), encoded(animated), encoded(file(still, icc_profile=profile)), encoded(moving))


def test_long_animations_are_not_gone_through(same, look):
    """What is behind the first frame does not even need to be there."""
    content = MALFORMED["gif-1000-frames"]
    same(encoded(content), encoded(content[:2000]))
    look(encoded(MALFORMED["webp-1000-frames"]))


@pytest.fixture
def prompt(post):
    """What the model reads of a conversation, each picture's tokens written once."""

    def read(messages: list[dict[str, Any]]) -> str:
        tokens = post({"model": "tiny", "messages": messages}, "/tokenize").json()["tokens"]
        words = post({"model": "tiny", "tokens": tokens}, "/detokenize").json()["prompt"]
        return words.replace("<imgpad>" * 64, "...").split("<|im_start|>user\n", 1)[1]

    return read


SPAN = "<img>...</img>\n"
END = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("ta", f"onePicture 1: {SPAN}"),
        ("at", f"Picture 1: {SPAN}one"),
        ("taubv", f"onePicture 1: {SPAN}twoPicture 2: {SPAN}three"),
        ("abt", f"Picture 1: {SPAN}Picture 2: {SPAN}one"),
        ("aa", f"Picture 1: {SPAN}Picture 2: {SPAN}"),
    ],
)
def test_text_and_pictures_keep_their_order(prompt, parts, expected):
    known = {"a": picture("red"), "b": picture("blue"), "t": text("one"), "u": text("two"), "v": text("three")}
    assert prompt(user([known[letter] for letter in parts])) == expected + END


def test_pictures_of_old_turns_stay_and_are_counted_on(prompt):
    first = user([picture("red"), text("What is it?")])
    history = [*first, {"role": "assistant", "content": "red"}]
    turn = f"Picture 1: {SPAN}What is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\n"
    assert prompt([*history, *user("Really?")]) == turn + "Really?" + END
    assert prompt([*history, *user([picture("blue"), text("And it?")])]) == turn + f"Picture 2: {SPAN}And it?" + END


def test_a_later_turn_reads_neither_picture_nor_beginning_again(server, post):
    names = ("mm_cache_hits_total", "mm_cache_queries_total")
    first = user([encoded(file(noise())), text("What is it?")])
    answer = post(chat(messages=first)).json()["choices"][0]["message"]["content"]
    before = [server.metric(name) for name in names]
    later = [*first, {"role": "assistant", "content": answer}, *user("Are you sure?")]
    usage = post(chat(messages=later)).json()["usage"]
    assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [1, 1]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_as_many_pictures_as_there_may_be_and_one_more(post):
    several = [picture("red", (40 + number, 30)) for number in range(8)]
    usage = post(chat(messages=user([*several, text("?")]))).json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 8 * 64
    history = [*user(several), {"role": "assistant", "content": "8"}, *user([picture()])]
    for messages in (user([*several, picture()]), history):
        assert "takes 8" in check_error(post(chat(messages=messages)), 400, "too_many_images", "messages")
    assert post(chat(messages=user([picture()]))).status_code == 200


def test_one_bad_picture_among_good_ones_is_named(post):
    parts = [picture(), text("and"), encoded(MALFORMED["png-cut-to-40"]), picture()]
    place = "messages.0.content.2.image_url.url"
    assert place in check_error(post(chat(messages=user(parts))), 400, "image_parse_error", place)


def test_detail_changes_nothing(same, post):
    url = encoded(file(noise()))["image_url"]["url"]
    same(at(url), at(url, detail="low"), at(url, detail="high"), at(url, detail="auto"))
    check_error(post(chat(messages=user([at(url, detail="best")]))), 400, "invalid_value")


def test_pictures_that_begin_alike_are_told_apart(look):
    """Files of equal size whose first kilobytes are equal, too."""
    above = {
        name: np.full((60, 64, 3), colour, np.uint8) for name, colour in (("red", (220, 0, 0)), ("blue", (0, 0, 220)))
    }
    below = noise(60, 64)
    files = {name: file(np.vstack([colour, below]), "BMP") for name, colour in above.items()}  # rows from below
    assert files["red"][:4096] == files["blue"][:4096]
    assert len(files["red"]) == len(files["blue"])
    (red, red_hit), (blue, blue_hit) = look(encoded(files["red"])), look(encoded(files["blue"]))
    assert not red_hit
    assert not blue_hit
    assert red != blue
    assert look(encoded(files["red"])) == (red, True)


def test_hostile_pictures_from_several_clients(server):
    """All of them: an answer or a refusal to each, probes answer meanwhile, and the memory is given back."""
    before = memory(server, "VmRSS")
    seconds: list[float] = []

    def ask(name: str) -> int:
        response = server.client.post(PATH, json=chat(messages=user([encoded(MALFORMED[name])]), max_tokens=1))
        if response.status_code != 200:
            check_error(response, 400, param=URL)
        return response.status_code

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, name) for name in MALFORMED]
        while not all(answer.done() for answer in answers):
            began = time.monotonic()
            assert server.client.get("/health").status_code == 200
            seconds.append(time.monotonic() - began)
            time.sleep(0.1)
    assert {answer.result() for answer in answers} == {200, 400}  # each within the client's minute
    assert np.median(seconds) < 0.5
    server.wait_until_idle()
    assert server.client.post(PATH, json=chat()).status_code == 200
    if before:
        # What was freed may stay with the C library, but not more than a few of the largest pictures take.
        assert memory(server, "VmHWM") - before < 2.5 * 2**30


def memory(server: ServerProcess, field: str) -> int:
    """VmRSS, or VmHWM, the peak so far, of a server; 0 where the system does not tell."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
