"""The picture with boxes as Python sees it: its words, its files, and what Gradio is told. Its looks: tests/browser."""

import dataclasses
import json
import re
import string

import gradio as gr
import pytest

from qwenvl_jax.demo.box_view import ASSETS, BOX_TEXTS, EMPTY, SCRIPTS, box_view
from qwenvl_jax.processing.boxes import COLOURS, Box


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_language_has_every_text():
    english = BOX_TEXTS["en"]
    for texts in BOX_TEXTS.values():
        assert list(texts) == list(english)
        assert {key: placeholders(text) for key, text in texts.items()} == {
            key: placeholders(text) for key, text in english.items()
        }
        assert all(text.strip() for text in texts.values())


def test_the_scripts_show_every_text_and_no_other():
    code = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    named = set(re.findall(r"\btexts\.(\w+)", code)) | {
        f"column_{name}" for name in ("number", "line", "label", "picture", "x1", "y1", "x2", "y2")
    }
    assert named == set(BOX_TEXTS["en"])


def test_every_script_is_joined():
    assert {path.name for path in ASSETS.glob("box_view*.js")} == set(SCRIPTS)


@pytest.mark.parametrize("name", ["box_view.html", "box_view.css"])
def test_a_template_has_nothing_that_a_template_would_replace(name):
    """Gradio reads both with Handlebars and as a template literal of JavaScript."""
    assert not re.findall(r"`|\\|\$\{|\{\{|@children", (ASSETS / name).read_text(encoding="utf-8"))


def test_no_file_names_an_address():
    for path in ASSETS.iterdir():
        assert not re.search(r"https?:|//\w+\.\w", path.read_text(encoding="utf-8")), path.name


def test_gradio_is_told_all_that_the_browser_needs():
    with gr.Blocks():
        view = box_view(BOX_TEXTS["en"], elem_id="boxes")
    config = json.loads(json.dumps(view.get_config()))
    assert config["props"] == {"texts": BOX_TEXTS["en"], "colours": list(COLOURS)}
    assert config["value"] == EMPTY
    assert config["elem_id"] == "boxes"
    assert view.get_block_name() == "html"


def test_a_value_of_boxes_goes_through_unchanged():
    box = dataclasses.asdict(Box("red car", 12, 30, 100, 90))
    picture = {"url": "/gradio_api/file=street.jpg", "name": "street.jpg", "width": 640, "height": 480}
    value = {"pictures": [picture], "shown": 0, "boxes": [box]}
    with gr.Blocks():
        assert box_view(BOX_TEXTS["en"]).postprocess(value) == value


def test_a_listener_can_be_told_of_a_drawn_box():
    with gr.Blocks() as page:
        view = box_view(BOX_TEXTS["en"])
        view.select(lambda: None, None, None)
    (dependency,) = page.get_config_file()["dependencies"]
    assert [tuple(target) for target in dependency["targets"]] == [(view._id, "select")]
