"""Trains the small byte-level BPE vocabulary of the tiny model, in the file format of `qwen.tiktoken`.

    python -m qwenvl_jax.data.vocabulary OUT

writes the shipped file again, bit for bit. The texts are the scenes' own questions and answers; nothing is downloaded.
Three rules keep the pieces simple: what is written on pictures is left out (words in capitals stay letter by letter,
as digits do by the pattern), a capital never merges with the space before it, and Chinese is cut at the names of
colours, shapes and places, so that a name is the same pieces in every sentence.

A checkpoint is trained with one vocabulary: a change of the sentences in `scene_text.py` calls for a new tiny model.
"""

import base64
import collections
import itertools
import pathlib
import sys
from collections.abc import Iterator

import regex

from qwenvl_jax.data.scene_text import (
    CHINESE,
    PICTURE_QUESTIONS,
    QUESTIONS,
    RELATION_QUESTIONS,
    RELATION_YESNO_QUESTIONS,
    RELATIONS,
    enumerate_phrases,
    name,
    translate,
    with_article,
)
from qwenvl_jax.data.scenes import COLORS, SHAPES, SIZES

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


def byte_order() -> list[int]:
    """The 256 byte values in GPT-2's order: the printable ones of Latin-1 first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [value for value in range(256) if value not in printable]


def corpus(rounds: int = 480) -> collections.Counter[str]:
    """How often each piece (a match of PATTERN, or a part of one, by the rules above) occurs in the scenes' texts.

    Each round asks and answers every kind of question once in each language; sentences, colours, shapes and sizes take
    turns, so no random numbers are involved. English is counted three times, as it is asked about three times as often.
    """
    pieces: collections.Counter[str] = collections.Counter()
    for number in range(rounds):
        pieces.update(piece for sentence in SENTENCES for piece in _pieces(sentence))
        for language, weight in (("en", 3), ("zh", 1)):
            counts = collections.Counter(piece for text in _texts(number, language) for piece in _pieces(text))
            for piece, count in counts.items():
                pieces[piece] += weight * count
    return pieces


def _texts(number: int, language: str) -> Iterator[str]:
    """The questions and answers of one round; the `number` of the round decides what they are about."""

    def turn(options, step: int = 1):
        return options[number // step % len(options)]

    colors, shapes, sizes = (turn(COLORS), COLORS[(number + 3) % 8]), (turn(SHAPES, 8), turn(SHAPES, 3)), turn(SIZES, 5)
    forms = (
        (None, colors[0], shapes[0]),
        (None, None, shapes[0]),
        (None, colors[0], None),
        (None, colors[0], shapes[0]),
    )
    form = turn((*forms, (sizes, colors[0], shapes[0]), (sizes, None, shapes[0])), 7)
    ref = name(language, *form)
    other = name(language, None, colors[1], shapes[1])
    slots = {
        "ref": ref,
        "thing": with_article(ref) if language == "en" else ref,
        "things": name(language, form[0], form[1], form[2], plural=True),
        "a": ref,
        "b": other,
        "k": turn((1, 2)),
    }
    for table in QUESTIONS.values():
        yield from (part.format(**slots) for part in turn(table[language]).split("{box}"))
    for axis, pair in RELATIONS.items():
        x, y = (translate(answer, language) for answer in pair[:: turn((1, -1))])
        for table in (RELATION_QUESTIONS[axis], RELATION_YESNO_QUESTIONS[axis]):
            yield turn(table[language]).format(x=x, y=y, **slots)
        yield x
    if number % 3 == 0:
        for table in PICTURE_QUESTIONS.values():
            yield turn(table[language], 3).format(**slots)
    exist = turn(("yes", "no")) if language == "en" else turn(("有", "没有"))
    for answer in (colors[0], shapes[0], sizes, exist, turn(("both", "neither", "yes", "no"))):
        yield translate(answer, language)
    yield ref
    yield f"({number % 100},{number}),({number},{number})"
    phrases = [name(language, turn(SIZES), *pair) for pair in zip(colors, shapes, strict=True)]
    phrases = [with_article(phrase) if language == "en" else "一个" + phrase for phrase in phrases]
    phrases.append(turn(("the word ", "the number ") if language == "en" else ("单词", "数字")))
    yield enumerate_phrases(phrases, language)
    yield phrases[0]


def _pieces(text: str):
    for match in regex.findall(PATTERN, text):
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
