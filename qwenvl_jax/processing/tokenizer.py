"""Qwen-VL's tokenizer: byte-level BPE on tiktoken, and the special tokens that follow the ranks.

The vocabulary is a `qwen.tiktoken` file of any size; the released one has 151,643 ranks. This file knows special
tokens and the original's image spans made of path bytes; what a conversation looks like is in `template.py`.
"""

import base64
import binascii
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tiktoken

from qwenvl_jax.config import UserError

# The GPT-4 split with single digits; tiktoken (Rust) regex syntax.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GROUNDING_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = ("<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
    *GROUNDING_TAGS,
    *IMAGE_TAGS,
)
# `\s+(?!\S)` backtracks: somewhere below a million blanks in a row tiktoken aborts with a Rust panic.
LONGEST_BLANK_RUN = 100_000
_TOO_MANY_BLANKS = re.compile(rf"\s{{{LONGEST_BLANK_RUN + 1}}}")


class Tokenizer:
    """Text to token ids and back.

    `ranks` maps the bytes of each ordinary token to its id, 0 to len(ranks)-1, and holds all 256 single bytes;
    `n_queries` is the number of ids between `<img>` and `</img>`. Special tokens take the ids from len(ranks) on, in
    the order of SPECIAL_TOKENS. Raises UserError when `ranks` is not such a table.
    """

    def __init__(self, ranks: Mapping[bytes, int], n_queries: int = 256):
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise UserError(
                f"the vocabulary lacks {len(missing)} of the 256 single bytes (first: 0x{missing[0]:02x}); "
                "this is not a byte-level tiktoken vocabulary"
            )
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"the {len(ranks)} ranks of the vocabulary are not the numbers 0 to {len(ranks) - 1}")
        self.ranks = dict(ranks)
        self.n_queries = n_queries
        self.special_tokens = {name: len(ranks) + position for position, name in enumerate(SPECIAL_TOKENS)}
        self.n_vocab = len(ranks) + len(SPECIAL_TOKENS)
        self.eod_id = self.special_tokens["<|endoftext|>"]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self.ref_start_id, self.ref_end_id = self.special_tokens["<ref>"], self.special_tokens["</ref>"]
        self.box_start_id, self.box_end_id = self.special_tokens["<box>"], self.special_tokens["</box>"]
        self.quad_start_id, self.quad_end_id = self.special_tokens["<quad>"], self.special_tokens["</quad>"]
        self.image_start_id, self.image_end_id = self.special_tokens["<img>"], self.special_tokens["</img>"]
        self.image_pad_id = self.special_tokens["<imgpad>"]
        self.grounding_ids = frozenset(self.special_tokens[tag] for tag in GROUNDING_TAGS)
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    def __reduce__(self):
        return Tokenizer, (self.ranks, self.n_queries)  # tiktoken's encoder does not pickle

    @classmethod
    def from_file(cls, path: str | os.PathLike, n_queries: int = 256) -> "Tokenizer":
        """Reads a `qwen.tiktoken` file. Raises UserError naming the file, and the line where one is wrong."""
        ranks = read_ranks(path)
        try:
            return cls(ranks, n_queries)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the vocabulary as a `qwen.tiktoken` file, which the original implementation reads."""
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(self.ranks.items(), key=_rank))
        Path(path).write_bytes(b"".join(lines))

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` after NFC normalisation; nothing in it is read as a special token, so text stays text."""
        return self._encoding.encode_ordinary(_normalised(text))

    def encode(
        self,
        text: str,
        allowed_special: Literal["all"] | Collection[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of `text` as the original gives them: special tokens in it count, `<img>path</img>` becomes path bytes.

        `allowed_special` names the special tokens that count (the others are ordinary text), `disallowed_special`
        those that raise ValueError. The UTF-8 bytes between `<img>` and `</img>` stand as ids equal to the byte
        values, filled up to n_queries with `<imgpad>`. Only for text of the developer: `encode_ordinary` is for
        everyone else's. Raises UserError for an unclosed `<img>`, and one with a special token or more than n_queries
        bytes inside.
        """
        if allowed_special != "all":
            allowed_special = set(allowed_special)
        ids = self._encoding.encode(
            _normalised(text), allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        result: list[int] = []
        for span, is_image in self._split_spans(ids):
            result += [self.image_start_id, *self._path_ids(span), self.image_end_id] if is_image else span
        return result

    def decode(
        self,
        ids: Iterable[int],
        skip_special_tokens: bool = False,
        errors: str = "replace",
        keep_image_special: bool = False,
    ) -> str:
        """Text of `ids` as the original gives it; image spans become `<img>path</img>` again.

        `skip_special_tokens` drops every id from `<|endoftext|>` on (a path stays as text); with `keep_image_special`
        the ref, box and quad tags survive that. `errors` says what becomes of incomplete UTF-8. Raises UserError for
        an unclosed image span, one without a pad id or with ids that are not bytes, and ids that are no token.
        """
        plain: list[int] = []
        for span, is_image in self._split_spans(ids):
            if is_image:
                plain += [self.image_start_id, *self.encode_ordinary(self._path(span)), self.image_end_id]
            else:
                plain += span
        if skip_special_tokens:
            kept = self.grounding_ids if keep_image_special else ()
            plain = [token for token in plain if token < self.eod_id or token in kept]
        wrong = next((token for token in plain if not 0 <= token < self.n_vocab), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is not in the vocabulary (0 to {self.n_vocab - 1})")
        return self._encoding.decode(plain, errors=errors)

    def _split_spans(self, ids: Iterable[int]) -> list[tuple[list[int], bool]]:
        """Cuts ids into (ids, is_image) pieces; an image's two tags are left out."""
        ids = [int(token) for token in ids]
        pieces, position = [], 0
        while self.image_start_id in ids[position:]:
            start = ids.index(self.image_start_id, position)
            if self.image_end_id not in ids[start:]:
                raise UserError("Unclosed image token: an <img> without </img>")
            end = ids.index(self.image_end_id, start)
            pieces += [(ids[position:start], False), (ids[start + 1 : end], True)]
            position = end + 1
        return [*pieces, (ids[position:], False)]

    def _path_ids(self, inner: Sequence[int]) -> list[int]:
        if any(token >= self.eod_id for token in inner):
            raise UserError("a special token inside <img>..</img>; only a path or URL may stand there")
        path = self._encoding.decode_bytes(list(inner))
        if len(path) > self.n_queries:
            raise UserError(
                f"The content in <img>..</img> is too long: {len(path)} bytes, at most {self.n_queries} are possible"
            )
        return [*path, *[self.image_pad_id] * (self.n_queries - len(path))]

    def _path(self, inner: Sequence[int]) -> str:
        """The text whose bytes fill the span `inner`, up to its first pad."""
        if self.image_pad_id not in inner:
            raise UserError(f"{self.image_pad_id} is not in list: an image span must end in at least one <imgpad>")
        path = inner[: inner.index(self.image_pad_id)]
        try:
            return bytes(path).decode("utf-8")
        except ValueError as error:  # ids above 255, or bytes that are no UTF-8
            raise UserError(f"the ids of an image span are not the bytes of a path ({error})") from None


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """The table of a `qwen.tiktoken` file: a line `base64(token bytes) rank` for each token. Raises UserError."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the vocabulary ({error.strerror}); give a qwen.tiktoken file") from None
    ranks: dict[bytes, int] = {}
    lines_of_ranks: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(b" ".join(fields[1:]))
        except (ValueError, binascii.Error):
            advice = "a pointer of Git LFS, fetch the file itself" if b"git-lfs" in line else "not a vocabulary?"
            shown = line[:60].decode("utf-8", "replace")
            raise UserError(f"{path}, line {number}: {shown!r} is not `base64-of-token rank` ({advice})") from None
        if rank in lines_of_ranks:
            raise UserError(f"{path}, line {number}: rank {rank} occurs again (first in line {lines_of_ranks[rank]})")
        if token in ranks:
            raise UserError(f"{path}, line {number}: token {token!r} occurs again (first as rank {ranks[token]})")
        ranks[token] = rank
        lines_of_ranks[rank] = number
    if not ranks:
        raise UserError(f"{path}: the vocabulary is empty")
    return ranks


def _rank(item: tuple[bytes, int]) -> int:
    return item[1]


def _normalised(text: str) -> str:
    if _TOO_MANY_BLANKS.search(text):
        raise UserError(f"the text holds more than {LONGEST_BLANK_RUN:,} blanks in a row; shorten them")
    return unicodedata.normalize("NFC", text)
