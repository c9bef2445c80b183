"""A conversation as the page keeps it: turns with pictures and replies, and what is derived from them.

What the page shows and what the server is asked both come from the turns, so that the model's box notation survives in
the history though the page hides it.
"""

import dataclasses
import re
from collections.abc import Sequence

from qwenvl_jax.demo.display import readable
from qwenvl_jax.demo.pictures import Picture, data_uri, sent_size
from qwenvl_jax.processing.boxes import Box, parse, to_pixels

MENTION = re.compile(r"(?:Picture|图|图片|第)\s*(\d{1,2})", re.IGNORECASE)  # as prompts do
_ASKED_BOX = re.compile(r"<box>\s*\((\d{1,4}),(\d{1,4})\),\((\d{1,4}),(\d{1,4})\)\s*</box>")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question with its pictures, and the reply as the model wrote it.

    cut: a word in the page's language where the reply did not end by itself ("stopped", "connection lost").
    """

    question: str
    pictures: tuple[Picture, ...] = ()
    reply: str = ""
    cut: str = ""


Turns = tuple[Turn, ...]


def pictures_of(turns: Turns) -> list[Picture]:
    """All pictures, in the order in which the model numbers them."""
    return [picture for turn in turns for picture in turn.pictures]


def boxes_of(turns: Turns) -> list[Box]:
    """The boxes in the last reply, finished ones only, in pixels of the pictures that they speak of.

    Qwen-VL does not say which picture a box is on. It is the one that the reply named last before it ("Picture 2"), or
    else the question, or else the latest, as in the original.
    """
    pictures = pictures_of(turns)
    if not pictures:
        return []
    reply = turns[-1].reply
    shown = _mentioned(turns[-1].question, len(pictures), len(pictures) - 1)
    found: list[Box] = []
    start = 0
    for mention in [*MENTION.finditer(reply), None]:
        end = len(reply) if mention is None else mention.start()
        found += parse(reply[start:end], (pictures[shown].width, pictures[shown].height), shown)
        if mention is not None:
            start = mention.end()
            shown = _mentioned(mention[0], len(pictures), shown)
    return found


def _mentioned(text: str, count: int, otherwise: int) -> int:
    """The picture that `text` names last, counted from 0."""
    numbers = [int(mention[1]) for mention in MENTION.finditer(text) if 1 <= int(mention[1]) <= count]
    return numbers[-1] - 1 if numbers else otherwise


def messages(turns: Turns, system: str = "", detail: str = "auto", box_parts: bool = True) -> list[dict]:
    """The conversation in OpenAI's form; a last turn without a reply ends it with the question.

    A `<box>` in a question is a place. box_parts: whether the server takes it as a part of its own, as this project's
    does, to whom text is only text; others get it as it is written. Raises UserError for a picture that is gone.
    """
    conversation: list[dict] = [{"role": "system", "content": system}] if system.strip() else []
    pictures: list[Picture] = []
    for turn in turns:
        pictures += turn.pictures
        content: list[dict] = [
            {"type": "image_url", "image_url": {"url": data_uri(picture), "detail": detail}}
            for picture in turn.pictures
        ]
        content += _question_parts(turn.question, pictures) if box_parts else [_text(turn.question)]
        conversation.append({"role": "user", "content": content})
        if turn.reply:
            conversation.append({"role": "assistant", "content": turn.reply})
    return conversation


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _question_parts(question: str, pictures: Sequence[Picture]) -> list[dict]:
    parts: list[dict] = []
    start = 0
    for match in _ASKED_BOX.finditer(question) if pictures else ():
        numbers = [int(number) for number in match.groups()]
        if max(numbers) > 1000:
            continue
        shown = _mentioned(question[: match.start()], len(pictures), len(pictures) - 1)
        extent = sent_size(pictures[shown]) * 2
        xs, ys = sorted(numbers[0::2]), sorted(numbers[1::2])
        corners = [to_pixels(number, side) for number, side in zip((xs[0], ys[0], xs[1], ys[1]), extent, strict=True)]
        if match.start() > start:
            parts.append(_text(question[start : match.start()]))
        parts.append({"type": "box", "box": corners, "image": shown})
        start = match.end()
    if start < len(question) or not parts:
        parts.append(_text(question[start:]))
    return parts


def bubbles(turns: Turns, waiting: bool = False) -> list[dict]:
    """The conversation as Gradio's chat shows it, two messages a turn, so that a message's number tells its turn.

    waiting: the last reply is still being written, and has no bubble while it is empty.
    """
    shown: list[dict] = []
    for number, turn in enumerate(turns):
        pictures = [{"path": picture.path, "alt_text": picture.name} for picture in turn.pictures]
        shown.append({"role": "user", "content": [*pictures, turn.question]})
        text = readable(turn.reply, numbered=bool(pictures_of(turns[: number + 1])))
        if turn.cut:
            text = f"{text}\n\n*{turn.cut}*"
        if text.strip() or not waiting or number < len(turns) - 1:
            shown.append({"role": "assistant", "content": [text.strip() or "–"]})
    return shown


def view(turns: Turns) -> dict:
    """Pictures and boxes for the view beside the chat."""
    pictures = pictures_of(turns)
    boxes = boxes_of(turns)
    return {
        "pictures": [
            {"url": picture.url, "name": picture.name, "width": picture.width, "height": picture.height}
            for picture in pictures
        ],
        "shown": boxes[0].image if boxes else (len(pictures) - 1 if pictures else None),
        "boxes": [dataclasses.asdict(box) for box in boxes],
    }
