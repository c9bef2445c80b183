"""The pages: complete, of one file, and nothing that a model, a data set or a file name says is markup."""

import base64
import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation.runs import ACCURACY, run
from PIL import Image

from qwenvl_jax.evaluation.baseline import Guess
from qwenvl_jax.evaluation.comparison import compare
from qwenvl_jax.evaluation.html_comparison import comparison_report
from qwenvl_jax.evaluation.html_parts import (
    SIDE,
    Run,
    likelihoods,
    picture,
    reference_boxes,
    reference_text,
    reply_boxes,
    reply_text,
)
from qwenvl_jax.evaluation.html_report import BEST, WORST, report, write_page
from qwenvl_jax.evaluation.scores import score
from qwenvl_jax.evaluation.task import Prediction

EVIL = '<script>alert("1")</script><img src="https://example.org/x.png">'
VOID = {"meta", "img", "br", "line", "circle", "rect"}


class Page(HTMLParser):
    """What a browser would see of a page, and whether every tag is closed where it should be."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def evil(folder: Path, wrong: int = 40) -> Run:
    """A run in which every text is evil, some replies are wrong and one failed."""
    Image.new("RGB", (900, 300)).save(folder / "picture.png")
    fields = {"question": EVIL, "groups": {EVIL: EVIL}, "pictures": ("picture.png",)}
    predictions = run([EVIL.casefold()] * 12 + [f"no {EVIL}"] * wrong, answer=EVIL.casefold(), **fields)
    predictions = [dataclasses.replace(p, id=f"{p.id} {EVIL}", tokens=place) for place, p in enumerate(predictions)]
    predictions[0] = dataclasses.replace(predictions[0], error=EVIL)
    metric = dataclasses.replace(ACCURACY, note=EVIL)
    manifest = {"task": f"docvqa_val {EVIL}", EVIL: {EVIL: EVIL}, "nothing": None}
    return Run(EVIL, manifest, predictions, score(predictions, metric, resamples=20), folder)


def harmless(text: str) -> Page:
    """The page, if it loads nothing and has no markup but its own."""
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form", "base"} == set()
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert page.of("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.of("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.of("svg"))
    return page


def test_nothing_of_others_is_markup_and_nothing_is_loaded(tmp_path):
    page = harmless(report(evil(tmp_path), Guess(EVIL, 20.0)))
    assert page.text.count(EVIL) > 100
    assert len(page.of("article")) == WORST + BEST
    for heading in ("Beside others", "Worst samples", "Best samples", "Replies", "Failed", "Made with"):
        assert heading in page.text


def test_a_comparison_is_as_harmless(tmp_path):
    first, second = evil(tmp_path), evil(tmp_path)
    predictions = [dataclasses.replace(p, reply=EVIL.casefold(), error=None) for p in second.predictions[:30]]
    predictions += second.predictions[30:]
    second = dataclasses.replace(second, predictions=predictions)
    found = compare(first.predictions, second.predictions, ACCURACY, resamples=20)
    page = harmless(comparison_report(found, first, second))
    assert "B alone19 (36.5%)" in page.text
    assert "Where B is better" in page.text
    assert "Where A is better" not in page.text  # it is nowhere
    assert page.text.count(EVIL) > 50


def test_a_page_is_bounded(tmp_path):
    """Pictures as thumbnails, long replies cut, long lists ended: a page for 5,000 samples is a few megabytes."""
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    predictions = run(["x" * 100_000] * 3000 + [None] * 2000, pictures=("noise.png",))
    predictions = [dataclasses.replace(p, groups={"kind": str(place)}) for place, p in enumerate(predictions)]
    found = score(predictions, ACCURACY, resamples=2, groups=())
    assert len(report(Run("long", {}, predictions, found, tmp_path))) < 8_000_000


def test_a_run_without_anything_has_a_page(tmp_path):
    page = Page(report(Run("empty", {}, [], score([], ACCURACY), tmp_path)))
    assert "empty" in page.text
    perfect = run(["yes"] * 3)
    page = Page(report(Run("perfect", {}, perfect, score(perfect, ACCURACY, resamples=9), tmp_path)))
    assert "Worst samples" not in page.text


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    predictions = run(["\ud800 no", "yes"])
    text = report(Run("odd", {}, predictions, score(predictions, ACCURACY, resamples=9), tmp_path))
    assert "\\ud800 no" in write_page(tmp_path / "report.html", text).read_text(encoding="utf-8")


def shown(prediction: Prediction, folder: Path) -> Image.Image:
    markup = picture({"answered": prediction}, folder)
    (image,) = Page(markup).of("img")
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))


def test_boxes_are_drawn_where_one_was_expected(tmp_path):
    Image.new("RGB", (100, 50), "black").save(tmp_path / "black.png")
    plain = Prediction("0", "(500,500),(900,900)</box>", {"answers": ["x"]}, pictures=("black.png",))
    boxed = dataclasses.replace(plain, reference={"box": [5, 5, 40, 40]})
    assert np.asarray(shown(plain, tmp_path)).max() < 20
    image = shown(boxed, tmp_path)
    assert image.size == (SIDE, SIDE // 2)
    # Expected in red from 22 to 179 pixels, answered in green from 224 to 403.
    red, green = (np.asarray(image).astype(int)[100, start:end].max(axis=0) for start, end in ((15, 30), (218, 232)))
    assert red[0] > 150 > red[1]
    assert green[1] > 120 > green[0]
    assert "1 expected, 1 answered" in picture({"answered": boxed}, tmp_path)


@pytest.mark.parametrize("name", ["missing.png", ".", "text.png", "\0", "/dev/zero"])
def test_what_is_no_picture_is_left_out(tmp_path, name):
    (tmp_path / "text.png").write_text("no picture")
    assert picture({"answered": Prediction("0", "", {}, pictures=(name,))}, tmp_path) == ""


@pytest.mark.parametrize(
    ("reply", "count"), [("<box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>", 2), ("(1,2),(3,4)</box>", 1), ("(1,2)", 0)]
)
def test_boxes_of_a_reply(reply, count):
    assert len(reply_boxes(reply, (100, 100))) == count


@pytest.mark.parametrize(
    "box", [None, 3, "abcd", [1, 2, 3], [1, 2, 3, "x"], [1, 2, 3, float("inf")], [1, 2, 3, float("nan")]]
)
def test_a_broken_reference_box_is_none(box):
    assert reference_boxes({"box": box}) == []


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ({"answers": ["a", "b", "a"]}, "a × 2<br>b"),
        ({"answer": 1, "choices": ["x", "<y>"]}, "B. &lt;y&gt;"),
        ({"answer": "b", "choices": ["x", "y"]}, "B. y"),
        ({"answer": "yes", "task": "count"}, "yes"),
        ({"box": [1, 2, 3, 4]}, "[1, 2, 3, 4] in pixels"),
        ({"other": {"deep": [1]}}, "other: {&quot;deep&quot;: [1]}"),
        ({}, ""),
    ],
)
def test_references_are_told_shortly(reference, text):
    assert reference_text(reference) == text


def test_choices_are_shown_with_likelihoods():
    reference = {"answer": 0, "choices": ["x", "y"]}
    shown = Page(likelihoods(Prediction("0", "B", reference, choice=1, likelihoods=(-2.5, -1.25)))).text
    assert "A. x (expected) -2.50" in shown
    assert "B. y (answered) -1.25" in shown


def test_an_empty_or_failed_reply_says_so():
    assert "an empty reply" in reply_text(Prediction("0", "", {}))
    assert "failed: &lt;b&gt;" in reply_text(Prediction("0", "", {}, error="<b>"))
