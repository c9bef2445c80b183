"""A page with two pictures with boxes, which shows in each the values that are written into its field, one by one."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from qwenvl_jax.demo.box_view import BOX_TEXTS, box_view

PAUSE = 0.1  # seconds between two values, as between the pieces of a reply


def build() -> gr.Blocks:
    """The fields' ids end in the language of their component: `wanted-en` takes a name and a list of values,
    `go-en` starts, `done-en` has the name when all were sent, `heard-en` has the drawn box that arrived last.
    """

    def stream(wanted: str) -> Iterator[dict]:
        for value in json.loads(wanted)["values"]:
            yield value
            time.sleep(PAUSE)

    def hear(event: gr.EventData) -> str:
        return json.dumps({"image": event.image, "box": event.box})

    with gr.Blocks(title="Boxes", analytics_enabled=False) as page, gr.Row():
        for language, texts in BOX_TEXTS.items():
            with gr.Column(min_width=300):
                view = box_view(texts, elem_id=f"view-{language}")
                wanted = gr.Textbox(elem_id=f"wanted-{language}", label="Values", lines=1, max_lines=1)
                done = gr.Textbox(elem_id=f"done-{language}", label="Sent")
                heard = gr.Textbox(elem_id=f"heard-{language}", label="Drawn")
                start = gr.Button("Start", elem_id=f"go-{language}")
                start.click(stream, wanted, view).then(lambda wanted: json.loads(wanted)["name"], wanted, done)
                view.select(hear, None, heard, trigger_mode="always_last")
    return page


def launch(pictures: Path) -> tuple[gr.Blocks, str]:
    """The served page, which may show the files in the folder `pictures`, and its address."""
    page = build()
    _, address, _ = page.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", allowed_paths=[str(pictures)]
    )
    return page, address
