"""Which prompts of a batch begin alike, so that their beginnings are read once: questions about one picture, mostly.

All beginnings of a batch have one length, so that a row's own tokens follow in the same slots as those of the others.
What is read then, and how, is in `decode.py`.
"""

from typing import NamedTuple

import numpy as np

SHORTEST_REST = 16  # tokens
WORTH = 0.5  # of the tokens of separate reading, where sharing begins: two calls cost more than one


def bucket(number: int, least: int = 1) -> int:
    """The smallest power of two times `least` that is not less than `number`."""
    size = least
    while size < number:
        size *= 2
    return size


def finer_bucket(number: int, least: int) -> int:
    """As `bucket`, or three quarters of that where it is enough."""
    size = bucket(number, least)
    return size * 3 // 4 if least < size and number <= size * 3 // 4 else size


class Shared(NamedTuple):
    """The first `length` tokens of U beginnings, and then `rest` tokens, padding included, of each row."""

    length: int
    padded: int  # tokens of a beginning, padding included
    rest: int
    first: np.ndarray  # int32 [U], a row that begins so
    which: np.ndarray  # int32 [B], which of them a row begins with


def shared_beginnings(tokens: np.ndarray, lengths: np.ndarray, rotary: np.ndarray, shortest: int) -> Shared | None:
    """How a batch is read with the fewest tokens, padding included; None where sharing would save little.

    tokens int32 [B, T], of which each row has `lengths` int [B]; slots of pictures are numbers that no other picture
    has. rotary float32 [B, R / 2]: keys depend on it, so only rows where it is equal share. shortest: the padded length
    of short beginnings.
    """
    rows, room = tokens.shape
    if rows == 1:
        return None
    known = np.concatenate([rotary.astype(np.float32).view(np.int32), tokens.astype(np.int32)], axis=1)
    order = sorted(range(rows), key=lambda row: known[row].tobytes())  # neighbours have most in common
    same = known[order[1:]] == known[order[:-1]]
    common = np.where(same.all(axis=1), known.shape[1], same.argmin(axis=1)) - rotary.shape[1]
    longest, padded = int(np.max(lengths)), bucket(rows)

    def cost(length: int) -> int:
        different = bucket(1 + int(np.sum(common < length)))
        return different * finer_bucket(length, shortest) + padded * bucket(longest - length, SHORTEST_REST)

    # More shared tokens are better until rows differ, and every row must have one left that says what comes next.
    most = int(np.min(lengths)) - 1
    candidates = {min(int(length), most, room - bucket(longest - min(int(length), most), SHORTEST_REST))
                  for length in common}  # fmt: skip
    candidates = {length for length in candidates if length > 0}
    length = min(candidates, key=cost, default=0)
    if not length or cost(length) > WORTH * padded * room:
        return None
    starts = np.concatenate([[True], common < length])
    index = np.empty(rows, np.int32)
    index[order] = np.cumsum(starts) - 1
    rest = bucket(longest - length, SHORTEST_REST)
    return Shared(length, finer_bucket(length, shortest), rest, np.array(order, np.int32)[starts], index)
