"""The forms that a training row may have, each to the one message format: docs/data.md shows an example of each.

A row is a dictionary. `conversations` holds turns with `from` and `value` (the original's own form, ShareGPT, LLaVA),
`messages` holds turns with `role` and `content` (OpenAI's form), `question` and `answer` are one turn. Strings of
`conversations` may hold the original's notation (`<img>path</img>`, `<ref>`, `<box>`, `<quad>`); a user's strings of
the others are plain text. In either, `<image>` stands for the next picture of the row's `image` or `images`.
"""

import re
import reprlib
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.data.problems import RecordError, record_error, split_advice
from qwenvl_jax.processing.legacy import PICTURE_NUMBER, user_parts

PLACEHOLDER = "<image>"
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}
_FORMS = "a record has 'conversations', 'messages', or 'question' and 'answer'"

Part = dict[str, Any]


class Conversation:
    """A row's messages while they are put together. fields: what the row calls the content of each message."""

    def __init__(self, pictures: Sequence[Any], root: Path):
        self.messages: list[dict[str, Any]] = []
        self.fields: list[str] = []
        self.rejected: str | None = None
        self.root = root
        self.pictures = pictures  # of the row's `images`
        self.placeholders = 0  # that were met
        self.shown: list[Any] = []  # pictures so far, wherever they came from

    def add(self, role: str, content: Any, field: str) -> None:
        self.messages.append({"role": role, "content": content})
        self.fields.append(field)

    def next_picture(self) -> Part:
        """The part for a placeholder. One too many gets no picture; that is found when all are counted."""
        here = self.placeholders
        self.placeholders += 1
        source = self.pictures[here] if here < len(self.pictures) else None
        self.shown.append(source)
        return {"type": "image", "image": source}


def read_row(row: Any, root: Path) -> Conversation:
    """The conversation of a row; relative paths start at `root`. Raises RecordError naming the field."""
    if not isinstance(row, Mapping):
        raise record_error("", f"{_kind(row)}, not an object", _FORMS)
    key = next((key for key in ("conversations", "messages", "question") if row.get(key) is not None), None)
    if key is None:
        raise record_error("", f"has the fields {_names(row)}", _FORMS)
    pictures_field, pictures = _row_pictures(row, root)
    conversation = Conversation(pictures, root)
    if row.get("system") is not None:
        conversation.add("system", _text(row["system"], "system"), "system")
    if key == "question":
        _read_question(row, conversation)
    else:
        _read_turns(row, key, conversation)
    if row.get("chosen") is not None:
        if conversation.messages[-1]["role"] == "assistant":
            raise record_error("chosen", "the turns end with an answer already", "remove that turn, or 'chosen'")
        conversation.add("assistant", _answer(row["chosen"], "chosen"), "chosen")
    rejected_field = next((key for key in ("rejected", "rejected_response") if row.get(key) is not None), None)
    if rejected_field:
        conversation.rejected = _answer(row[rejected_field], rejected_field)
    if conversation.messages[-1]["role"] != "assistant":
        raise record_error(conversation.fields[-1], "the last turn is the user's", "add the answer to it")
    if conversation.placeholders != len(pictures):
        raise record_error(
            pictures_field or conversation.fields[0],
            f"{len(pictures)} pictures, but {conversation.placeholders} {PLACEHOLDER} in the text",
            f"give one {PLACEHOLDER} for each picture of 'images', in their order",
        )
    return conversation


def _read_question(row: Mapping[str, Any], conversation: Conversation) -> None:
    """A row of a question and an answer; pictures come first where the question does not place them."""
    question = _text(row["question"], "question")
    if PLACEHOLDER not in question:
        question = PLACEHOLDER * len(conversation.pictures) + question
    conversation.add("user", _placed(question, conversation, "question"), "question")
    if row.get("answer") is not None:
        conversation.add("assistant", _text(row["answer"], "answer"), "answer")
    elif row.get("chosen") is None:
        raise record_error("answer", "missing", "give the text to learn")


def _read_turns(row: Mapping[str, Any], key: str, conversation: Conversation) -> None:
    turns = _turns(row[key], key)
    names = [_turn_keys(turn, key, f"{key}[{i}]") for i, turn in enumerate(turns)]
    roles = [_role(turn, names[i][0], f"{key}[{i}]") for i, turn in enumerate(turns)]
    first = 0
    if roles[0] == "system":
        if conversation.messages:
            raise record_error(f"{key}[0]", "a second system prompt beside 'system'", "keep one of them")
        first = 1
    if key == "conversations" and roles[first : first + 1] == ["assistant"]:
        roles[first], first = "skipped", first + 1  # as the original and LLaVA do
    _check_turns(roles, first, [f"{key}[{i}].{name}" for i, (name, _) in enumerate(names)])
    for i, (turn, role) in enumerate(zip(turns, roles, strict=True)):
        field = f"{key}[{i}].{names[i][1]}"
        content = turn[names[i][1]]
        if role == "user":
            conversation.add("user", _user_content(content, key, conversation, field), field)
        elif role != "skipped":
            conversation.add(role, _own_content(content, key, role, conversation, field), field)


def _turns(turns: Any, key: str) -> Sequence[Mapping[str, Any]]:
    """The list of turns; TFDS and older Hugging Face datasets keep a dictionary of lists instead, turned here."""
    if isinstance(turns, Mapping) and turns and all(isinstance(column, list) for column in turns.values()):
        if len({len(column) for column in turns.values()}) != 1:
            raise record_error(key, "lists of different lengths", "give as many values as speakers")
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list):
        raise record_error(key, f"{_kind(turns)}, not a list", "give the turns of a conversation")
    if not turns:
        raise record_error(key, "empty", "give a question and an answer, or remove the record")
    return turns


def _turn_keys(turn: Any, key: str, field: str) -> tuple[str, str]:
    """The names of a turn's speaker and content: from and value, or role and content."""
    if not isinstance(turn, Mapping):
        raise record_error(field, f"{_kind(turn)}, not an object", "a turn has a speaker and a text")
    pairs = [("from", "value"), ("role", "content")]
    expected = pairs[key == "messages"]
    names = next((pair for pair in pairs if pair[0] in turn), expected)
    for name in names:
        if turn.get(name) is None:
            raise record_error(
                f"{field}.{name}", "missing", f"a turn of {key!r} has {expected[0]!r} and {expected[1]!r}"
            )
    if turn.get("weight") == 0 or turn.get("loss") is False:
        raise record_error(field, "asks not to be learnt (weight, loss)", "every answer is; split or remove the record")
    return names


def _role(turn: Mapping[str, Any], name: str, field: str) -> str:
    role = turn[name]
    if not isinstance(role, str) or role not in ROLES:
        raise record_error(f"{field}.{name}", f"unknown role {_shown(role)}", f"use one of {', '.join(ROLES)}")
    return ROLES[role]


def _check_turns(roles: Sequence[str], first: int, fields: Sequence[str]) -> None:
    """From `first` on, user and assistant take turns."""
    if first == len(roles):
        raise record_error(fields[-1], "no turn of the user's", "give a question and an answer")
    for i in range(first, len(roles)):
        expected = ("user", "assistant")[(i - first) % 2]
        if roles[i] != expected:
            advice = "user and assistant take turns, after at most one system turn; join or remove turns"
            raise record_error(fields[i], f"{roles[i]!r} where {expected!r} is expected", advice)


def _user_content(content: Any, key: str, conversation: Conversation, field: str) -> Any:
    if isinstance(content, list):
        return _parts(content, conversation, field)
    return _placed(_text(content, field), conversation, field, legacy=key == "conversations")


def _own_content(content: Any, key: str, role: str, conversation: Conversation, field: str) -> Any:
    """The content of an assistant's or system turn: its text as it stands, or parts."""
    if isinstance(content, list):
        return _parts(content, conversation, field)
    text = _text(content, field)
    if key == "conversations" and re.search(r"<img>.*</img>", text, re.DOTALL):
        raise record_error(field, f"a picture in a turn of the {role}", "pictures belong to the user's turns")
    return text


def _placed(text: str, conversation: Conversation, field: str, legacy: bool = False) -> list[Part] | str:
    """The parts of a user's text: pictures at their placeholders, and the text between, with the original's notation
    read where it is `legacy`.
    """
    pieces = text.split(PLACEHOLDER)
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(conversation.next_picture())
            piece = piece.removeprefix("\n")  # pictures bring a line break of their own
        if number < len(pieces) - 1:
            piece = PICTURE_NUMBER.sub("", piece)
        if legacy:
            parts += _legacy_parts(piece, conversation, field)
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts or ""


def _legacy_parts(text: str, conversation: Conversation, field: str) -> list[Part]:
    try:
        return user_parts(text, lambda path: _picture(path, conversation.root, field), conversation.shown)
    except RecordError:
        raise
    except UserError as error:
        raise record_error(field, *split_advice(str(error))) from None


def _parts(content: Sequence[Any], conversation: Conversation, field: str) -> list[Part]:
    """Content that is a list of parts already; a picture without a source is the row's next one."""
    parts: list[Part] = []
    for number, part in enumerate(content):
        where = f"{field}[{number}]"
        if not isinstance(part, Mapping):
            raise record_error(where, f"{_kind(part)}, not an object", "a part has a 'type'")
        part = {key: value for key, value in part.items() if value is not None}  # tables have every column in each part
        url = part.pop("image_url", None) if part.get("type") == "image_url" else None
        if url is not None:
            if not isinstance(url, Mapping) or not isinstance(url.get("url"), str):
                raise record_error(f"{where}.image_url", "has no 'url'", 'give {"url": "path or data: URI"}')
            source = _picture(url["url"], conversation.root, f"{where}.image_url.url")
            part = part | {"type": "image", "image": source}
        elif part.get("type") == "image" and "image" in part:
            part["image"] = _picture(part["image"], conversation.root, f"{where}.image")
        elif part.get("type") == "image":
            parts.append(part | conversation.next_picture())
            continue
        if part.get("type") == "image":
            conversation.shown.append(part["image"])
        parts.append(part)
    return parts


def _answer(value: Any, field: str) -> str:
    """The text of a chosen or rejected answer: a string, a turn, or a list of one turn."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("value", value.get("content"))
    if not isinstance(value, str):
        raise record_error(field, "not one answer", "give its text, or one assistant turn")
    return value


def _row_pictures(row: Mapping[str, Any], root: Path) -> tuple[str, list[Any]]:
    """The name of the row's field of pictures ("" where it has none) and their sources."""
    fields = [key for key in ("image", "images") if row.get(key) is not None]
    if len(fields) == 2:
        raise record_error("images", "beside 'image'", "keep one of them")
    if not fields:
        return "", []
    value = row[fields[0]]
    if not isinstance(value, list):
        return fields[0], [_picture(value, root, fields[0])]
    return fields[0], [_picture(item, root, f"{fields[0]}[{number}]") for number, item in enumerate(value)]


def _picture(value: Any, root: Path, field: str) -> Any:
    """A picture's source as a message part names it: a path from the record's folder, a URI, bytes or an array."""
    if isinstance(value, Mapping):  # how Hugging Face datasets keep pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | np.ndarray):
        return value
    if not isinstance(value, str) or not value:
        raise record_error(field, f"{_shown(value)} is no picture", "give a path, a data: URI or the bytes of a file")
    if value.startswith("file://"):
        return urllib.parse.unquote(urllib.parse.urlsplit(value).path)
    if value.startswith("data:") or "://" in value:
        return value
    return str(root / value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise record_error(field, f"{_kind(value)}, not a text", "give a string")
    return value


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(row)[:8])) or "none"


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _kind(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
