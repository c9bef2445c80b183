"""A reply's text as a person reads it, without the box notation; the boxes are shown as numbers or drawn instead."""

import re

from qwenvl_jax.processing.boxes import parse

# A box that is still being written counts too: the chat page shows a reply while it grows.
_BOX = re.compile(r"<box>.*?(?:</box>|\Z)", re.DOTALL)
_REFERENCE = re.compile(r"</?ref>")
_UNFINISHED_TAG = re.compile(r"</?(?:b(?:ox?)?|r(?:ef?)?)?\Z")


def readable(text: str, numbered: bool = False) -> str:
    """`text` without `<ref>` tags and `<box>…</box>`, finished or not; what stood inside the `<ref>` stays.

    `"<ref>the cat</ref><box>(1,2),(3,4)</box>"` becomes `"the cat"`. numbered: each box that can be drawn leaves its
    number, counted from 1: `"the cat [1]"`.
    """
    count = 0

    def number(match: re.Match) -> str:
        nonlocal count
        if not (numbered and parse(match[0], (1000, 1000))):
            return ""
        count += 1
        before = "" if text[: match.start()][-1:].isspace() else " "
        return f"{before}[{count}]"

    return _UNFINISHED_TAG.sub("", _REFERENCE.sub("", _BOX.sub(number, text))).strip()
