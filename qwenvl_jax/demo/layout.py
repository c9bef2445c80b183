"""What stands on the page and where: Gradio's components, without what they do."""

import dataclasses
from pathlib import Path
from typing import Any

import gradio as gr

from qwenvl_jax.demo.asking import DETAILS, NUMBERS
from qwenvl_jax.demo.box_view import BOX_TEXTS, box_view
from qwenvl_jax.demo.texts import Texts

ASSETS = Path(__file__).parent / "assets"
PICTURES = Path(__file__).parents[1] / "assets" / "pictures"
# kind of task: pictures of its card
EXAMPLES = {
    "caption": ("tiles.png",),
    "question": ("word.png",),
    "reading": ("number.png",),
    "counting": ("tiles.png",),
    "grounding": ("word.png",),
    "inside": ("word.png",),
    "pictures": ("word.png", "number.png"),
    "chinese": ("word.png",),
    "json": ("tiles.png",),
}
SCHEMA = """{
  "type": "object",
  "properties": {
    "objects": {"type": "integer", "minimum": 0, "maximum": 99},
    "description": {"type": "string", "maxLength": 80}
  },
  "required": ["objects", "description"],
  "additionalProperties": false
}"""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The components that do something. settings: by the names of `asking.Settings`."""

    turns: gr.State
    ready: gr.HTML
    poll: gr.Timer
    chat: gr.Chatbot
    notice: gr.HTML
    field: gr.MultimodalTextbox
    camera: gr.Image
    add_camera: gr.Button
    address: gr.Textbox
    add_address: gr.Button
    address_notice: gr.HTML
    view: gr.HTML
    status: gr.HTML
    settings: dict[str, gr.components.Component]
    settings_notice: gr.HTML
    reset: gr.Button
    curl: gr.Textbox
    python: gr.Textbox


def lay_out(texts: Texts) -> Parts:
    """The components of one page, within a `gr.Blocks` context."""
    parts: dict = {"turns": gr.State(()), "poll": gr.Timer(1.0, active=False)}
    with gr.Row(elem_id="head", equal_height=True):
        gr.HTML(
            f"<h1>{texts.title}</h1><p>{texts.hint} "
            f'<a href="{texts.other_path}" lang="{"zh" if texts.language == "en" else "en"}">{texts.other}</a></p>',
            js_on_load=f'document.documentElement.lang = "{texts.language}"',
        )
        parts["ready"] = gr.HTML(_said("", "status"), elem_id="ready", min_width=160)
    with gr.Row(elem_id="columns"):
        with gr.Column(scale=3, min_width=340):
            parts["chat"] = gr.Chatbot(
                label=texts.chat,
                height="max(340px, calc(100vh - 330px))",
                placeholder=texts.empty,
                examples=[_card(texts, kind, names) for kind, names in EXAMPLES.items()],
                editable="user",
                group_consecutive_messages=False,  # in a group that begins with a picture no text can be edited
                buttons=["copy", "copy_all"],
                allow_tags=["box"],
                allow_file_downloads=False,  # the view beside it has them
                elem_id="chat",
            )
            parts["notice"] = gr.HTML(_said("", "alert"), elem_id="notice", elem_classes="notice")
            parts["field"] = gr.MultimodalTextbox(
                label=texts.question,
                placeholder=texts.placeholder,
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                autofocus=True,
                elem_id="field",
            )
            with gr.Accordion(texts.more_pictures, open=False, elem_id="more"):
                parts["address"] = gr.Textbox(
                    label=texts.address, placeholder=texts.address_hint, max_length=8192, elem_id="address"
                )
                parts["add_address"] = gr.Button(texts.add_address, elem_id="add-address")
                parts["address_notice"] = gr.HTML(_said("", "alert"), elem_id="address-notice", elem_classes="notice")
                parts["camera"] = gr.Image(
                    label=texts.camera, sources=["webcam"], type="filepath", format="jpeg", height=240, elem_id="camera"
                )
                parts["add_camera"] = gr.Button(texts.add_camera, elem_id="add-camera")
        with gr.Column(scale=2, min_width=340):
            parts["view"] = box_view(BOX_TEXTS[texts.language], elem_id="view")
            parts["status"] = gr.HTML(_said("", "status"), label=texts.status, elem_id="status")
            with gr.Accordion(texts.settings, open=False, elem_id="settings"):
                parts["settings"] = _settings(texts)
                parts["settings_notice"] = gr.HTML(_said("", "alert"), elem_id="settings-notice", elem_classes="notice")
                parts["reset"] = gr.Button(texts.reset, elem_id="reset")
            with gr.Accordion(texts.code, open=False, elem_id="code"):
                parts["curl"] = _code(texts, texts.curl, "curl")
                parts["python"] = _code(texts, texts.python, "python")
    gr.HTML(f"<p>{texts.footer}</p>", elem_id="foot")
    return Parts(**parts)


def _said(text: str, role: str) -> str:
    """A live region, which screen readers speak when it changes."""
    return f'<p role="{role}">{text}</p>'


def _card(texts: Texts, kind: str, names: tuple[str, ...]) -> Any:
    title, question = texts.examples[kind]
    return {
        "text": question,
        "display_text": f"{title}: {question}",
        "files": [str(PICTURES / name) for name in names],
    }


def _settings(texts: Texts) -> dict[str, gr.components.Component]:
    gr.HTML(f"<p>{texts.settings_hint}</p>")
    made: dict[str, gr.components.Component] = {}
    with gr.Row():
        for name in NUMBERS:
            # Not gr.Number, which shows 0 where nothing is set.
            made[name] = gr.Textbox(label=texts.numbers[name], min_width=150, max_length=40, elem_id=f"setting-{name}")
    made["system"] = gr.Textbox(label=texts.system, lines=2, max_length=20_000, elem_id="setting-system")
    choices = [(texts.details[name], name) for name in DETAILS]
    made["detail"] = gr.Radio(choices, value="auto", label=texts.detail, elem_id="setting-detail")
    made["schema"] = gr.Textbox(
        label=texts.schema, placeholder=texts.schema_hint, lines=3, max_length=65_536, elem_id="setting-schema"
    )
    return made


def _code(texts: Texts, label: str, name: str) -> gr.Textbox:
    return gr.Textbox(
        texts.no_code, label=label, lines=4, max_lines=16, interactive=False, buttons=["copy"], elem_id=f"code-{name}"
    )
