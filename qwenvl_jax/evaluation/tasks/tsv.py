"""The TSV of VLMEvalKit and OpenCompass: a table with a column `image` that holds pictures in base64.

A cell without anything is a field that is missing, and so is "nan", as some releases write it. Other words for nothing
stay what they are; pandas, by which the original and VLMEvalKit read these files, also takes an option "None" or "NA"
for none.
"""

import ast
import base64
import binascii
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.tasks.files import Row
from qwenvl_jax.evaluation.tasks.prompts import LETTERS

REFERENCE_LENGTH = 64  # an image cell up to this long is the index of the row that has the picture
NOTHING = ("", "nan")
_MOST = 1 << 30  # bytes of one cell


def read_tsv(path: Path) -> Iterator[tuple[Row, tuple[bytes, ...]]]:
    """The rows of the table with the pictures of each."""
    wanted = {row.fields["image"] for row in _rows(path) if _is_reference(row.fields.get("image"))}
    found: dict[str, tuple[bytes, ...]] = {}
    for row in _rows(path):
        image = row.fields.get("image")
        if image and _is_reference(image):
            if image not in found:
                found |= _look_up(path, image)
            if image not in found:
                raise row.error("image", f"refers to the row with index {image!r}, which has no picture")
            pictures = found[image]
        else:
            pictures = tuple(_decoded(row, text) for text in _cells(row, image)) if image else ()
        if row.fields.get("index") in wanted:
            found[row.fields["index"]] = pictures
        yield row, pictures


def _rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_MOST)
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            for fields in reader:
                line = reader.line_num
                where = f"{path}, line {line}"
                if None in fields or None in fields.values():
                    raise UserError(f"{where}: does not have the {len(reader.fieldnames or ())} columns of the header")
                yield Row(where, {name: value for name, value in fields.items() if value not in NOTHING})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}, after line {line}: cannot be read ({error})") from None


def _is_reference(image: str | None) -> bool:
    return image is not None and len(image) <= REFERENCE_LENGTH


def _look_up(path: Path, index: str) -> dict[str, tuple[bytes, ...]]:
    """The pictures of a row further down."""
    for row in _rows(path):
        image = row.fields.get("image")
        if row.fields.get("index") == index and image and not _is_reference(image):
            return {index: tuple(_decoded(row, text) for text in _cells(row, image))}
    return {}


def _cells(row: Row, image: str) -> list[str]:
    """Several pictures stand in a Python list of texts."""
    return [str(text) for text in python_list(row, "image")] if image.startswith("[") else [image]


def _decoded(row: Row, text: str) -> bytes:
    """The bytes of a picture. What is no base64 is a broken picture, which is for those who open it to say."""
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError):
        return b""


def python_list(row: Row, field: str) -> list[Any]:
    """A list that was written as Python shows it: "['a', 'b']"."""
    text = row.text(field)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise row.error(field, f"holds {text[:60]!r}, not a list as Python writes it")
    return value


def options(row: Row) -> list[str]:
    """The texts in the columns A, B, C, ..., as many as there are."""
    return [row.text(letter) for letter in LETTERS if letter in row.fields]


def answer_number(row: Row, choices: list[str]) -> int | None:
    """The number of the right choice, None where `answer` is hidden. Raises UserError where it is no letter of one."""
    if "answer" not in row.fields:
        return None
    letters = [letter for letter in LETTERS if letter in row.fields]
    answer = row.text("answer").strip().upper()
    if answer not in letters:
        raise row.error("answer", f"holds {answer!r}, and the options are {', '.join(letters) or 'missing'}")
    return letters.index(answer)
