r"""ChatML, the conversation format of Qwen-VL-Chat: small functions that turn roles, text, pictures and boxes into ids.

A `Segment` is a run of token ids with, for each id, the row of image features that replaces its embedding. Segments
add up, so `processor.py` joins them to a conversation and a data pipeline can join them to packed rows of its own.
The layout (Qwen-VL paper, section 3.3, and the label mask of the original's fine-tuning):

    <|im_start|>system\n{text}<|im_end|>\n
    <|im_start|>user\nPicture 1: <img>{n_queries slots}</img>\n{text}<|im_end|>\n
    <|im_start|>assistant\n{text}<|im_end|>\n

Content is a list of `Piece`s: a string is ordinary text, in which nothing is ever read as a special token; special
tokens are only those that this file puts there. Nothing here loads a picture.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from qwenvl_jax.processing.boxes import corners_text
from qwenvl_jax.processing.images import picture_key
from qwenvl_jax.processing.tokenizer import GROUNDING_TAGS, Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
IGNORED = -100  # label of a position that is not trained
_GROUNDING = re.compile("(" + "|".join(GROUNDING_TAGS) + ")")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads.

    input_ids: int32 [T]. image_slots: int32 [T], -1 at text, else the row of image_features.reshape(I * Q, D) that
    takes the place of the embedding. pixels: float32 [I, 3, S, S], the pictures that occur in input_ids. sources: the
    RGB pictures of the whole conversation; where the window cut off old turns, `pixels` are those of the last I of
    them.
    """

    input_ids: np.ndarray
    image_slots: np.ndarray
    pixels: np.ndarray
    sources: list[Image.Image]

    @functools.cached_property
    def picture_keys(self) -> tuple[bytes, ...]:
        """A digest of each picture."""
        return tuple(map(picture_key, self.pixels))


@dataclasses.dataclass(frozen=True)
class Segment:
    """Token ids and, of the same length, their image slots (-1 at text)."""

    ids: list[int]
    slots: list[int]

    def __add__(self, other: "Segment") -> "Segment":
        return Segment(self.ids + other.ids, self.slots + other.slots)

    def __len__(self) -> int:
        return len(self.ids)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and image_slots, both int32 [T]."""
        return np.array(self.ids, np.int32), np.array(self.slots, np.int32)


@dataclasses.dataclass(frozen=True)
class Special:
    """One special token, such as `<ref>`."""

    id: int


@dataclasses.dataclass(frozen=True)
class Slots:
    """The n_queries ids that the features of the picture in row `row` of the prompt's pixels replace."""

    row: int


Piece = str | Special | Slots


def segment(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Segment:
    """Encodes pieces; strings side by side are tokenised as one, as if they had been one text."""
    ids: list[int] = []
    slots: list[int] = []
    text = ""
    for piece in (*pieces, None):
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            ids += tokenizer.encode_ordinary(text)
            text = ""
        slots += [-1] * (len(ids) - len(slots))
        if isinstance(piece, Special):
            ids.append(piece.id)
        elif isinstance(piece, Slots):
            count = tokenizer.n_queries
            ids += [tokenizer.image_pad_id] * count
            slots += range(piece.row * count, (piece.row + 1) * count)
    return Segment(ids, slots + [-1] * (len(ids) - len(slots)))


def plain(ids: Sequence[int]) -> Segment:
    """A segment of ids without pictures."""
    return Segment(list(ids), [-1] * len(ids))


def picture_pieces(tokenizer: Tokenizer, row: int, number: int) -> list[Piece]:
    r"""`Picture {number}: <img>slots</img>\n` for the picture in row `row` of the prompt's pixels."""
    return [f"Picture {number}: ", *span_pieces(tokenizer, row), "\n"]


def span_pieces(tokenizer: Tokenizer, row: int) -> list[Piece]:
    """`<img>slots</img>`, the bare span of base-model prompts."""
    return [Special(tokenizer.image_start_id), Slots(row), Special(tokenizer.image_end_id)]


def box_pieces(tokenizer: Tokenizer, label: str | None, corners: Sequence[float], size: tuple[int, int]) -> list[Piece]:
    """`<ref>label</ref><box>(x1,y1),(x2,y2)</box>` for corners in pixels of a picture of `size` (width, height).

    Four points instead of two give a `<quad>`.
    """
    reference = [] if label is None else ref_pieces(tokenizer, label)
    start, end = tokenizer.box_start_id, tokenizer.box_end_id
    if len(corners) == 8:
        start, end = tokenizer.quad_start_id, tokenizer.quad_end_id
    return [*reference, Special(start), corners_text(corners, size), Special(end)]


def ref_pieces(tokenizer: Tokenizer, label: str) -> list[Piece]:
    """`<ref>label</ref>`."""
    return [Special(tokenizer.ref_start_id), label, Special(tokenizer.ref_end_id)]


def reply_pieces(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """An assistant's text, in which the tags of ref, box and quad count, and no other special token."""
    tags = tokenizer.special_tokens
    return [Special(tags[piece]) if piece in GROUNDING_TAGS else piece for piece in _GROUNDING.split(text) if piece]


def header(tokenizer: Tokenizer, role: str) -> Segment:
    r"""`<|im_start|>role\n`; that of the assistant ends a prompt."""
    return plain([tokenizer.im_start_id, *tokenizer.encode_ordinary(role), *newline(tokenizer).ids])


def block(tokenizer: Tokenizer, role: str, content: Segment) -> Segment:
    r"""`<|im_start|>role\ncontent<|im_end|>`. Blocks are joined by `newline`."""
    return header(tokenizer, role) + content + plain([tokenizer.im_end_id])


def newline(tokenizer: Tokenizer) -> Segment:
    """The line break between blocks, tokenised on its own."""
    return plain(tokenizer.encode_ordinary("\n"))


def training_labels(tokenizer: Tokenizer, role: str, content: Segment, answers_only: bool = False) -> list[int]:
    r"""Labels of `block(...) + newline(...)`, unshifted, IGNORED where nothing is learnt.

    As in the original's fine-tuning, every role learns `<|im_start|>` and the closing `<|im_end|>\n`, and the
    assistant its whole content. With `answers_only` only the assistant's content and its `<|im_end|>` are learnt: what
    a reply consists of, and nothing after it.
    """
    line_break = newline(tokenizer).ids
    closing = [tokenizer.im_end_id, *line_break]
    inside = len(header(tokenizer, role)) - 1
    learns_content = role == "assistant"
    middle = content.ids if learns_content else [IGNORED] * len(content)
    if answers_only:
        ending = tokenizer.im_end_id if learns_content else IGNORED
        return [IGNORED] * (1 + inside) + middle + [ending] + [IGNORED] * len(line_break)
    return [tokenizer.im_start_id, *[IGNORED] * inside, *middle, *closing]


def newest_within(lengths: Sequence[int], used: int, window: int) -> int:
    """How many of the newest turns stay, given the `lengths` of all turns in ids, oldest first.

    Whole turns are kept from the newest backwards while `used` plus the turns kept stays below `window`, as in the
    original.
    """
    kept = 0
    for length in reversed(lengths):
        if used + length >= window:
            break
        used += length
        kept += 1
    return kept
