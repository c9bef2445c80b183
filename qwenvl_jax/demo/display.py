"""A reply's text as a person reads it, without the box notation; the boxes are shown as numbers or drawn instead."""

import re

# A box that is still being written counts too: the chat page shows a reply while it grows.
_BOX = re.compile(r"<box>.*?(?:</box>|\Z)", re.DOTALL)
_REFERENCE = re.compile(r"</?ref>")
_UNFINISHED_TAG = re.compile(r"</?(?:b(?:ox?)?|r(?:ef?)?)?\Z")


def readable(text: str) -> str:
    """`text` without `<ref>` tags and `<box>…</box>`, finished or not; what stood inside the `<ref>` stays.

    `"<ref>the cat</ref><box>(1,2),(3,4)</box>"` becomes `"the cat"`.
    """
    return _UNFINISHED_TAG.sub("", _REFERENCE.sub("", _BOX.sub("", text))).strip()
