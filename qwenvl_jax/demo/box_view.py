"""The picture with boxes, shown beside the chat: one Gradio component, made of `gr.HTML` and the files in `assets/`.

It shows the pictures of a conversation, one at a time, with the boxes of one reply drawn on it and listed in a table;
it lets the visitor save both and draw a box to ask about. Drawing is all the browser's: Python sends what there is to
see, many times a second while a reply streams, and hears of a drawn box. Not here: reading boxes out of a reply
(`processing/boxes.py`) and what a conversation does with a drawn box.

The value is JSON, all sizes and corners in source pixels of the picture as it is displayed:

    {"pictures": [{"url": "/gradio_api/file=...", "name": "street.jpg", "width": 640, "height": 480}],
     "shown": 0,            # the picture to show; None leaves the choice to the component and the visitor
     "boxes": [{"image": 0, "label": "red car", "x1": 12, "y1": 30, "x2": 100, "y2": 90}]}  # label may be None

The fields of a box are those of `processing.boxes.Box`, so `dataclasses.asdict` makes them. A drawn box arrives as the
event `select` with the number of its picture and its corners:

    view = box_view(BOX_TEXTS["en"])

    def ask_about(event: gr.EventData):
        event.image, event.box  # 0, [12, 30, 100, 90]

    view.select(ask_about, None, question, trigger_mode="always_last")  # the default drops what comes meanwhile
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from qwenvl_jax.processing.boxes import COLOURS

ASSETS = Path(__file__).parent / "assets"
# One function's body once they are joined, in this order: each file names what the next ones use.
SCRIPTS = ("box_view_marks.js", "box_view_table.js", "box_view_draw.js", "box_view_save.js", "box_view.js")
EMPTY: dict[str, Any] = {"pictures": [], "shown": None, "boxes": []}

# What stands in braces is filled in by the component.
BOX_TEXTS = {
    "en": {
        "title": "Pictures and boxes",
        "no_picture": "Pictures and their boxes appear here.",
        "no_boxes": "No boxes to show. Ask where something is in the picture.",
        "pictures": "Pictures",
        "picture": "Picture {number}: {name}",
        "draw": "Draw a box to ask about it",
        "save_picture": "Download picture with boxes",
        "save_json": "Download JSON",
        "caption": "Boxes of the reply, corners in pixels",
        "column_number": "Box",
        "column_line": "Line",
        "column_label": "Label",
        "column_picture": "Picture",
        "column_x1": "Left",
        "column_y1": "Top",
        "column_x2": "Right",
        "column_y2": "Bottom",
        "no_label": "no label",
        "row": "Box {number}: {label}",
        "hint": "Drag over the picture. Or with the keys: arrows move the crosshair (with Shift in larger steps), "
        "Enter sets each of two corners, Esc cancels.",
        "at": "{x}, {y}",
        "corner": "First corner at {x}, {y}. Move to the opposite corner and press Enter.",
        "chosen": "Box chosen: left {x1}, top {y1}, right {x2}, bottom {y2}.",
        "too_small": "That box is too small.",
        "cancelled": "Cancelled.",
        "not_saved": "The picture could not be saved.",
    },
    "zh": {
        "title": "图片与方框",
        "no_picture": "图片及其方框会显示在这里。",
        "no_boxes": "没有可显示的方框。请询问图中某物的位置。",
        "pictures": "图片",
        "picture": "图片 {number}：{name}",
        "draw": "画一个方框来提问",
        "save_picture": "下载带方框的图片",
        "save_json": "下载 JSON",
        "caption": "回复中的方框，坐标以像素为单位",
        "column_number": "方框",
        "column_line": "线条",
        "column_label": "标签",
        "column_picture": "图片",
        "column_x1": "左",
        "column_y1": "上",
        "column_x2": "右",
        "column_y2": "下",
        "no_label": "无标签",
        "row": "方框 {number}：{label}",
        "hint": "在图片上拖动。也可使用键盘：方向键移动十字线（按住 Shift 步长更大），回车键依次确定两个角，"
        "Esc 键取消。",
        "at": "{x}，{y}",
        "corner": "第一个角位于 {x}，{y}。请移到对角并按回车键。",
        "chosen": "已选方框：左 {x1}，上 {y1}，右 {x2}，下 {y2}。",
        "too_small": "方框太小。",
        "cancelled": "已取消。",
        "not_saved": "无法保存图片。",
    },
}


def box_view(texts: Mapping[str, str], **settings: Any) -> gr.HTML:
    """The component, empty. `texts` are all words that it shows; `settings` are gr.HTML's own, such as `elem_id`.

    A function, not a subclass of gr.HTML: for those Gradio writes a file of types beside the source.
    """
    return gr.HTML(
        EMPTY,
        html_template=_asset("box_view.html"),
        css_template=_asset("box_view.css"),
        js_on_load="\n".join(_asset(name) for name in SCRIPTS),
        apply_default_css=False,
        texts=dict(texts),
        colours=list(COLOURS),
        **settings,
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
