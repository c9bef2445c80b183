"""The chat page: pictures and questions in, a growing reply and the picture with its boxes out.

The conversation is kept as `Turn`s in the visitor's own session. What the page shows and what the model is asked are
both derived from them, so the model's box notation survives in the history though the page hides it.
"""

import dataclasses
import secrets
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from qwenvl_jax.config import UserError
from qwenvl_jax.demo.display import readable
from qwenvl_jax.processing.boxes import draw, parse
from qwenvl_jax.processing.images import load_image
from qwenvl_jax.vlm import VLM

TITLE = "Qwen-VL in JAX"
HINT = "Add one or several pictures and ask about them. The model may be wrong."
PICTURES = Path(__file__).parents[1] / "assets" / "pictures"
EXAMPLES = (
    ("Where is the yellow cross?", "word.png"),
    ("What number is written in the picture?", "number.png"),
    ("What is in the picture?", "tiles.png"),
)
DAY = 24 * 3600  # seconds


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question with its picture files, the reply as the model wrote it, and the picture with that reply's boxes.

    Pictures are paths in Gradio's cache, which deletes them a day after they came.
    """

    question: str
    pictures: tuple[str, ...] = ()
    reply: str = ""
    drawn: str | None = None


Turns = tuple[Turn, ...]


def build(vlm: VLM) -> gr.Blocks:
    """The page for `vlm`, ready to launch. Visitors wait in line: the model answers one question at a time."""

    def answer(submitted: dict, turns: Turns) -> Iterator[tuple]:
        """Stream the reply to what was submitted: the chat, the turns and the input field, again and again.

        The field is emptied at once, and filled again when the question could not be answered.
        """
        field = None
        try:
            for grown in _reply(vlm, (*turns, _turn(submitted))):
                yield bubbles(grown), grown, field
                field = gr.skip()  # the visitor may be typing the next question
        except UserError as error:
            gr.Warning(str(error))  # not gr.Error, which would cover the conversation
            yield bubbles(turns), turns, submitted

    def again(turns: Turns) -> Iterator[tuple]:
        """Replace the last reply."""
        if turns:
            for grown in _reply(vlm, (*turns[:-1], dataclasses.replace(turns[-1], reply="", drawn=None))):
                yield bubbles(grown), grown

    def clear() -> tuple:
        return [], ()

    with gr.Blocks(title=TITLE, fill_height=True, delete_cache=(DAY, DAY), analytics_enabled=False) as page:
        gr.Markdown(f"## {TITLE}\n{HINT}")
        turns = gr.State(())
        chat = gr.Chatbot(show_label=False, height="60vh", scale=1)
        field = gr.MultimodalTextbox(
            label="Question",
            placeholder="Ask about the picture …",
            file_types=["image"],
            file_count="multiple",
            autofocus=True,
        )
        gr.Examples([{"text": question, "files": [str(PICTURES / name)]} for question, name in EXAMPLES], field)
        field.submit(answer, [field, turns], [chat, turns, field])
        chat.retry(again, turns, [chat, turns])
        chat.clear(clear, None, [chat, turns])
    return page.queue()


def _turn(submitted: dict) -> Turn:
    """What the input field holds. Raises UserError for an empty question or a file that is no picture."""
    question = (submitted.get("text") or "").strip()
    if not question:
        raise UserError("Please write a question, too.")
    pictures = tuple(submitted.get("files") or ())
    for path in pictures:
        try:
            load_image(path)
        except UserError as error:
            raise UserError(str(error).replace(path, Path(path).name)) from None  # the visitor knows no other name
    return Turn(question, pictures)


def _reply(vlm: VLM, turns: Turns) -> Iterator[Turns]:
    """The turns with a growing reply in the last one, at the end with its boxes drawn."""
    text = ""
    yield turns
    for piece in vlm.stream(messages(turns)):
        text += piece
        yield (*turns[:-1], dataclasses.replace(turns[-1], reply=text))
    yield (*turns[:-1], dataclasses.replace(turns[-1], reply=text, drawn=_boxed_picture(text, turns)))


def _boxed_picture(text: str, turns: Turns) -> str | None:
    """The file of the conversation's latest picture with the boxes in `text` drawn; None without a picture or a box."""
    paths = [path for turn in turns for path in turn.pictures]
    if not paths:
        return None
    picture = load_image(paths[-1])
    boxes = parse(text, picture.size)
    if not boxes:
        return None
    path = Path(paths[-1]).with_name(f"boxes-{secrets.token_hex(8)}.png")  # beside the upload, so cleaned up like it
    draw(picture, boxes).save(path)
    return str(path)


def messages(turns: Turns) -> list[dict]:
    """The conversation as the front door takes it; a last turn without a reply ends it with the question."""
    conversation: list[dict] = []
    for turn in turns:
        content: list[dict] = [{"type": "image", "image": picture} for picture in turn.pictures]
        content.append({"type": "text", "text": turn.question})
        conversation.append({"role": "user", "content": content})
        if turn.reply:
            conversation.append({"role": "assistant", "content": turn.reply})
    return conversation


def bubbles(turns: Turns) -> list[dict]:
    """The conversation as Gradio's chat shows it."""
    shown: list[dict] = []
    for turn in turns:
        shown.append({"role": "user", "content": [*({"path": path} for path in turn.pictures), turn.question]})
        text = readable(turn.reply)
        reply: list = [text] if text else []
        if turn.drawn is not None:
            reply.append({"path": turn.drawn})
        if reply:
            shown.append({"role": "assistant", "content": reply})
    return shown
