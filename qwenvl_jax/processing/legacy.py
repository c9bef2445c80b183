r"""The original's string forms, bit for bit and quirk for quirk: for old data, old prompts and comparisons.

In them a picture is a path inside the text (`Picture 1: <img>path</img>\n`) and a user's text can forge it; so they
are for text that you trust. Nothing but this file and readers of old data knows them: `user_parts` and
`messages_from_query` lead to the message format that all else uses.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.processing import template
from qwenvl_jax.processing.boxes import Box, draw, read_corners, to_pixels
from qwenvl_jax.processing.images import ImageSource, image_size, load_image
from qwenvl_jax.processing.template import DEFAULT_SYSTEM, IGNORED, Segment
from qwenvl_jax.processing.tokenizer import GROUNDING_TAGS, IMAGE_TAGS, SPECIAL_TOKENS, Tokenizer

CONTENT_TAGS = (*GROUNDING_TAGS, *IMAGE_TAGS)  # the special tokens that count in the content of a chat
_OPENING = re.compile("<(img|ref|box|quad)>")
PICTURE_NUMBER = re.compile(r"Picture \d+: ?$")  # before a picture; it is numbered anew
_FORBIDDEN_IN_LISTS = [name for name in SPECIAL_TOKENS if name not in (*CONTENT_TAGS, "<|endoftext|>")]

ListFormat = list[dict[str, Any]]
History = Sequence[Sequence[str | None]]  # (query, response) pairs


def from_list_format(elements: Sequence[Mapping[str, Any]]) -> str:
    """The text of a list of {"image": path}, {"text": str} and {"box": [[x1, y1, x2, y2], ...], "ref": label} elements.

    Boxes are in thousandths already and are truncated. Raises ValueError for an element of no such form.
    """
    text, pictures = "", 0
    for element in elements:
        if "image" in element:
            pictures += 1
            text += f"Picture {pictures}: <img>{element['image']}</img>\n"
        elif "text" in element:
            text += element["text"]
        elif "box" in element:
            text += f"<ref>{element['ref']}</ref>" if "ref" in element else ""
            for x1, y1, x2, y2 in element["box"]:
                text += f"<box>({int(x1)},{int(y1)}),({int(x2)},{int(y2)})</box>"
        else:
            raise UserError(f"a list-format element needs 'image', 'text' or 'box', this one has {sorted(element)}")
    return text


def to_list_format(text: str) -> list[dict[str, str]]:
    """Cuts a text into {"text" | "image" | "ref" | "box" | "quad": str} elements; contents are left as they stand.

    Raises ValueError for an unclosed tag and for ChatML or extra special tokens in the text.
    """
    forbidden = next((name for name in _FORBIDDEN_IN_LISTS if name in text), None)
    if forbidden:
        raise UserError(f"the text holds the special token {forbidden}, which the list format has no place for")
    return _elements(text)


def _elements(text: str) -> list[dict[str, str]]:
    elements: list[dict[str, str]] = []
    position = 0
    while opening := _OPENING.search(text, position):
        if opening.start() > position:
            elements.append({"text": text[position : opening.start()]})
        closing = f"</{opening[1]}>"
        end = text.find(closing, opening.end())
        if end < 0:
            raise UserError(f"Unclosed {opening[0]} at character {opening.start()}: {closing} is missing")
        elements.append({"image" if opening[1] == "img" else opening[1]: text[opening.end() : end]})
        position = end + len(closing)
    return [*elements, {"text": text[position:]}] if position < len(text) else elements


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt as text and ids, for `chat_format` "chatml" or "raw"; old turns are cut to `max_window_size` ids."""
    if chat_format == "raw":
        return query, tokenizer.encode(query)
    if chat_format != "chatml":
        raise UserError(f"chat_format {chat_format!r} does not exist; use 'chatml' or 'raw'")
    start_text, start_ids = _block(tokenizer, "system", system)
    turns = [_turn(tokenizer, question, answer) for question, answer in history or ()]
    kept = template.newest_within([len(ids) for _, ids in turns], len(start_ids), max_window_size)
    query_text, query_ids = _block(tokenizer, "user", query)
    newline = template.newline(tokenizer).ids
    recent = turns[len(turns) - kept :]
    text = start_text + "".join(turn for turn, _ in recent) + f"\n{query_text}\n<|im_start|>assistant\n"
    ids = start_ids + [token for _, turn in recent for token in turn] + newline + query_ids + newline
    return text, ids + template.header(tokenizer, "assistant").ids


def decode_tokens(tokenizer: Tokenizer, ids: Sequence[int], context_length: int, raw_text_length: int) -> str:
    """The response of the original's `chat` for `ids`: a context of `context_length` ids, then what was generated.

    `raw_text_length` is the length of the context's text in characters. The response ends before the first ChatML
    token; where none was generated its last id is lost, as in the original.
    """
    ids = [int(token) for token in ids]
    stops = (tokenizer.im_start_id, tokenizer.im_end_id)
    end = next((i for i in range(context_length, len(ids)) if ids[i] in stops), max(len(ids) - 1, context_length))
    return tokenizer.decode(ids[:end])[raw_text_length:].strip()


def finetune_preprocess(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    max_length: int,
    system: str = DEFAULT_SYSTEM,
) -> dict[str, np.ndarray]:
    """The rows of the original's fine-tuning: input_ids, labels (int32), attention_mask (bool), each [B, max_length].

    A conversation is a list of {"from": "user" | "assistant", "value": str}; a first turn that is not the user's is
    left out. All special tokens in a value count. Rows are filled up with `<|endoftext|>` and cut at `max_length`,
    wherever that is. Raises UserError naming the conversation and turn for another `from`.
    """
    input_ids = np.full((len(conversations), max_length), tokenizer.eod_id, np.int32)
    labels = np.full((len(conversations), max_length), IGNORED, np.int32)
    for row, conversation in enumerate(conversations):
        turns = list(conversation[1:] if conversation and conversation[0].get("from") != "user" else conversation)
        ids, targets = _training_block(tokenizer, "system", template.segment(tokenizer, [system]))
        for number, turn in enumerate(turns):
            if turn.get("from") not in ("user", "assistant"):
                raise UserError(
                    f"conversations[{row}], turn {number}: from is {turn.get('from')!r}, not user or assistant"
                )
            more_ids, more = _training_block(tokenizer, turn["from"], template.plain(tokenizer.encode(turn["value"])))
            ids, targets = ids + more_ids, targets + more
        count = min(len(ids), max_length)
        input_ids[row, :count], labels[row, :count] = ids[:count], targets[:count]
    return {"input_ids": input_ids, "labels": labels, "attention_mask": input_ids != tokenizer.eod_id}


def boxes_in_response(response: str) -> list[tuple[str | None, list[int]]]:
    """(label, [x1, y1, x2, y2] in thousandths) of each box; a label counts only directly before its box.

    Raises ValueError for a coordinate that is no integer, AssertionError for a box that has not four.
    """
    found: list[tuple[str | None, list[int]]] = []
    previous: Mapping[str, str] = {}
    for element in to_list_format(response):
        if "box" in element:
            numbers = [int(number) for number in element["box"].replace("(", "").replace(")", "").split(",")]
            if len(numbers) != 4:
                raise AssertionError(f"a box of {len(numbers)} numbers: {element['box']}")
            found.append((previous["ref"].strip() if "ref" in previous else None, numbers))
        previous = element
    return found


def latest_picture(response: str, history: History | None = None) -> str | None:
    """The path of the last picture in the newest text among the response and the queries before it."""
    for text in (response, *(query for query, _ in reversed(history or ()))):
        pictures = [element["image"] for element in to_list_format(text or "") if "image" in element]
        if pictures:
            return pictures[-1]
    return None


def draw_boxes_on_latest_picture(
    response: str, history: History | None = None, root: str | os.PathLike = "."
) -> Image.Image | None:
    """The boxes of `response` on the latest picture, whose path is relative to `root`; None without picture or box."""
    path, found = latest_picture(response, history), boxes_in_response(response)
    if path is None or not found:
        return None
    picture = load_image(Path(root) / path, mode="reference")
    return draw(picture, [pixel_box(label, numbers, picture.size) for label, numbers in found])


def pixel_box(label: str | None, thousandths: Sequence[int], size: tuple[int, int]) -> Box:
    """A box of the text on a picture of `size` (width, height), truncated to pixels; corners stay in their order."""
    x1, y1, x2, y2 = (to_pixels(number, extent) for number, extent in zip(thousandths, (*size, *size), strict=True))
    return Box(label, x1, y1, x2, y2)


def messages_from_query(
    query: str, history: History | None = None, system: str | None = None, root: str | os.PathLike = "."
) -> list[dict[str, Any]]:
    """The messages of a `chat` call of the original. Paths are relative to `root`; see `user_parts` for the rest."""

    def find(path: str) -> str:
        return path if "://" in path else str(Path(root) / path)

    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    pictures: list[ImageSource] = []
    for question, answer in history or ():
        messages.append({"role": "user", "content": user_parts(question or "", find, pictures)})
        messages.append({"role": "assistant", "content": answer or ""})
    return [*messages, {"role": "user", "content": user_parts(query, find, pictures)}]


def user_parts(text: str, find: Callable[[str], ImageSource], pictures: list[ImageSource]) -> list[dict[str, Any]]:
    r"""The parts of a user's text of the original; `pictures` collects the pictures of the conversation.

    `Picture N: <img>path</img>\n` and a bare `<img>path</img>` become an image part with `find(path)` (numbered anew,
    over the whole conversation), a box or quad becomes such a part on the latest picture with the label directly
    before it, a label without a box a ref part. Raises UserError for an unclosed tag, and for a box that cannot be
    read or has no picture.
    """
    elements = _elements(text)
    parts: list[dict[str, Any]] = []
    for position, element in enumerate(elements):
        ((kind, content),) = element.items()
        previous = elements[position - 1] if position else {}
        following = elements[position + 1] if position + 1 < len(elements) else {}
        if kind == "image":
            pictures.append(find(content))
            parts.append({"type": "image", "image": pictures[-1]})
        elif kind in ("box", "quad"):
            parts.append(_corner_part(kind, content, previous.get("ref"), pictures))
        elif kind == "ref":
            labelled = "box" in following or "quad" in following
            parts += [] if labelled else [{"type": "ref", "ref": content}]
        else:
            content = content.removeprefix("\n") if "image" in previous else content
            content = PICTURE_NUMBER.sub("", content) if "image" in following else content
            parts += [{"type": "text", "text": content}] if content else []
    return parts


def _corner_part(kind: str, text: str, label: str | None, pictures: Sequence[ImageSource]) -> dict[str, Any]:
    numbers = read_corners(text, kind)
    if not pictures:
        raise UserError(f"the {kind} {text} in a user's text has no picture before it; put the picture first")
    width, height = image_size(pictures[-1])
    corners = [number / 1000 * extent for number, extent in zip(numbers, (width, height) * 4, strict=False)]
    return {"type": kind, kind: corners, "label": label}


def _block(tokenizer: Tokenizer, role: str, content: str) -> tuple[str, list[int]]:
    """Text and ids of a block; the tags of pictures and boxes in `content` count, ChatML does not."""
    ids = template.block(tokenizer, role, template.plain(tokenizer.encode(content, allowed_special=CONTENT_TAGS))).ids
    return f"<|im_start|>{role}\n{content}<|im_end|>", ids


def _turn(tokenizer: Tokenizer, query: str | None, response: str | None) -> tuple[str, list[int]]:
    """A turn of the history; without a response it ends in a line break, which the original then doubles."""
    newline = template.newline(tokenizer).ids
    query_text, query_ids = _block(tokenizer, "user", query or "")
    if response is None:
        return f"\n{query_text}\n", newline + query_ids + newline
    response_text, response_ids = _block(tokenizer, "assistant", response)
    return f"\n{query_text}\n{response_text}", newline + query_ids + newline + response_ids


def _training_block(tokenizer: Tokenizer, role: str, content: Segment) -> tuple[list[int], list[int]]:
    ids = template.block(tokenizer, role, content) + template.newline(tokenizer)
    return ids.ids, template.training_labels(tokenizer, role, content)
