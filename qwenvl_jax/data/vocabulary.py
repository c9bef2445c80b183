"""Trains the small byte-level BPE vocabulary of the tiny model, in the file format of `qwen.tiktoken`.

    python -m qwenvl_jax.data.vocabulary OUT

writes the shipped file again, bit for bit. The texts are the scenes' own questions and answers; nothing is downloaded.
Three rules keep the pieces simple: what is written on pictures is left out (words in capitals stay letter by letter,
as digits do by the pattern), a capital never merges with the space before it, and Chinese is cut at the names of
colours, shapes and places, so that a name is the same pieces in every sentence.
"""

import base64
import collections
import itertools
import pathlib
import sys

import numpy as np
import regex

from qwenvl_jax.data.conversations import two_pictures
from qwenvl_jax.data.questions import KIND_WEIGHTS, Question, as_parts, scene_questions
from qwenvl_jax.data.scene_text import CHINESE
from qwenvl_jax.data.scenes import sample_scene

VOCABULARY_SIZE = 807  # with the 217 special tokens of the family 1024
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = (
    "system",
    "user",
    "assistant",
    "You are a helpful assistant.",
    "Picture 1: ",
)
_NAMES = sorted({word for word in CHINESE.values() if len(word) > 1} | {"大的", "小的", "一个"}, key=len, reverse=True)
_CUTS = regex.compile("(" + "|".join(_NAMES) + ")")
_WRITTEN = regex.compile(r"[A-Z]{2,}")


def byte_order() -> list[int]:
    """The 256 byte values in GPT-2's order: the printable ones of Latin-1 first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [value for value in range(256) if value not in printable]


def question_texts(question: Question) -> list[str]:
    """The text of a question and its answer, boxes as the model writes them."""
    texts = []
    for part in [*as_parts(question.question), *as_parts(question.answer)]:
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            x1, y1, x2, y2 = (round(value) for value in part["box"])
            texts += [part["label"] or "", f"({x1},{y1}),({x2},{y2})"]
    return texts


def corpus(scenes: int = 700, seed: int = 0) -> collections.Counter[str]:
    """How often each piece (a match of PATTERN, or a part of one, by the rules above) occurs in the scenes' texts."""
    rng = np.random.Generator(np.random.Philox(seed))
    pieces: collections.Counter[str] = collections.Counter()
    previous = sample_scene(seed, "train", scenes)
    for index in range(scenes):
        scene = sample_scene(seed, "train", index)
        questions = scene_questions(scene, rng, 12, {**KIND_WEIGHTS, "relation_yesno": 0.8, "size": 0.8}, 0.3)
        questions += two_pictures(previous, scene, rng, chinese_share=0.3).turns
        previous = scene
        for text in (*SENTENCES, *(text for question in questions for text in question_texts(question))):
            pieces.update(_pieces(text))
    return pieces


def _pieces(text: str):
    for match in regex.findall(PATTERN, _WRITTEN.sub("", text)):
        if match[:1] == " " and match[1:2].isupper():
            yield from (" ", match[1:])
        else:
            yield from filter(None, _CUTS.split(match))


def train(pieces: collections.Counter[str], size: int = VOCABULARY_SIZE) -> dict[bytes, int]:
    """Byte-pair encoding: ranks of `size` byte strings, the 256 bytes first, then always the most frequent pair.

    Ties go to the pair that comes first in byte order. Raises ValueError when the pieces hold too few pairs.
    """
    ranks = {bytes([value]): rank for rank, value in enumerate(byte_order())}
    words = {piece: [bytes([value]) for value in piece.encode()] for piece in sorted(pieces)}
    while len(ranks) < size:
        pairs: collections.Counter[tuple[bytes, bytes]] = collections.Counter()
        for piece, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += pieces[piece]
        if not pairs:
            raise ValueError(f"the texts give only {len(ranks)} of {size} ranks; more or longer texts are needed")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        for parts in words.values():
            _merge(parts, best)
    return ranks


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Join each neighbouring `pair`, in place."""
    index = 0
    while index < len(parts) - 1:
        if (parts[index], parts[index + 1]) == pair:
            parts[index : index + 2] = [pair[0] + pair[1]]
        index += 1


def write(path: str | pathlib.Path) -> None:
    """Train the vocabulary of the tiny model and write it, one `base64 rank` per line."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in train(corpus()).items()]
    pathlib.Path(path).write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m qwenvl_jax.data.vocabulary OUT")
    write(sys.argv[1])
