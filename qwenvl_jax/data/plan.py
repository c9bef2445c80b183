"""Which records stand in which row of which batch: a pure function of their order, their lengths and a seed.

Rows of whole records are packed by best fit, longest first, within windows of the records' order; without packing a row
is one record, and records of like length share a batch. Everything is planned before the first step, so that the
number of a batch is all the state that the data has, whatever the number of workers and processes.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from qwenvl_jax.data.mixture import hash_seed

WINDOW = 1024  # records that are packed together; more gain little
BUCKETS = 4  # row lengths without packing, each compiled once
BUCKET_STEP = 64  # tokens; row lengths are multiples
SPARE = 1.1  # picture slots offered for each picture that an average batch has

Row = list[int]  # indexes of records


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shape of a batch: rows, the most tokens of a row, and picture slots, which the rows share."""

    rows: int
    tokens: int
    pictures: int


class Plan:
    """A sequence of batches; `plan[i]` is the row length of batch i and its rows, at most as many as its shape has."""

    def __init__(self, batches: list[tuple[int, list[Row]]]):
        rows = [row for _, batch in batches for row in batch]
        self.lengths = np.array([length for length, _ in batches], np.int32)
        self.records = np.array([record for row in rows for record in row], np.int32)
        self.row_ends = np.cumsum([0, *(len(row) for row in rows)])
        self.batch_ends = np.cumsum([0, *(len(batch) for _, batch in batches)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[int, list[np.ndarray]]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        ends = self.row_ends[self.batch_ends[number] : self.batch_ends[number + 1] + 1]
        return int(self.lengths[number]), [self.records[a:b] for a, b in itertools.pairwise(ends)]

    def shown(self, batches: int) -> int:
        """How many batches show all the records that the first `batches` do."""
        _, first = np.unique(self.records[: self.row_ends[self.batch_ends[batches]]], return_index=True)
        row = np.searchsorted(self.row_ends, first.max(initial=0), side="right") - 1
        return int(np.searchsorted(self.batch_ends, row, side="right"))


def make_plan(
    passes: Iterable[np.ndarray],
    tokens: np.ndarray,
    pictures: np.ndarray,
    shape: BatchShape,
    *,
    packing: bool,
    seed: int,
    batches: int | None = None,
) -> Plan:
    """Plans all `passes` over the records, or as many of them as `batches` batches need.

    passes: for each epoch the indexes of its records in the order to train on; tokens, pictures int [R]: by index, none
    beyond the shape. A batch may hold records of two passes; the very last one may be short of rows.
    """
    planned = _batches(passes, tokens, pictures, shape, packing, seed)
    return Plan(list(planned if batches is None else itertools.islice(planned, batches)))


def picture_slots(tokens: np.ndarray, pictures: np.ndarray, rows: int, row_tokens: int, packing: bool) -> int:
    """Picture slots for batches of these records, a multiple of `rows`: a few more than an average batch needs."""
    if not pictures.sum():
        return 0
    rows_of_all = tokens.sum() / row_tokens if packing else len(tokens)
    wanted = max(SPARE * pictures.sum() / rows_of_all * rows, pictures.max())
    return int(np.ceil(wanted / rows)) * rows


def _batches(passes, tokens, pictures, shape: BatchShape, packing: bool, seed: int):
    """The batches as (row length, rows), one after another."""
    lengths = [shape.tokens] if packing else bucket_lengths(tokens, shape.tokens)
    waiting: list[list[Row]] = [[] for _ in lengths]
    for rng, window in _windows(passes, seed):
        rows = best_fit(window, tokens, pictures, shape.tokens, shape.pictures) if packing else [[r] for r in window]
        for number in rng.permutation(len(rows)):  # packing put the longest first
            waiting[0 if packing else bisect.bisect_left(lengths, tokens[rows[number][0]])].append(rows[number])
        full = []
        for length, queue in zip(lengths, waiting, strict=True):
            while len(queue) >= shape.rows:
                full.append((length, _take(queue, pictures, shape)))
        yield from (full[number] for number in rng.permutation(len(full)))
    for i, queue in enumerate(waiting[:-1]):  # what is left of a length goes among the next longer ones
        waiting[i + 1][:0] = queue
    while waiting[-1]:
        yield lengths[-1], _take(waiting[-1], pictures, shape)


def _windows(passes: Iterable[np.ndarray], seed: int) -> Iterator[tuple[np.random.Generator, list[int]]]:
    """The records, pass after pass, in windows of about equal size, each pass with random numbers of its own."""
    for epoch, records in enumerate(passes):
        rng = np.random.default_rng(hash_seed(seed, epoch))
        for window in np.array_split(records, max(1, -(-len(records) // WINDOW))):
            yield rng, window.tolist()


def best_fit(window: list[int], tokens, pictures, row_tokens: int, row_pictures: int) -> list[Row]:
    """Rows of whole records: each, longest first, goes where it leaves the least room, else opens a row."""
    rows: list[Row] = []
    used_pictures: list[int] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, in order
    for record in sorted(window, key=lambda record: -tokens[record]):
        length, count = int(tokens[record]), int(pictures[record])
        place = bisect.bisect_left(room, (length, -1))
        while place < len(room) and used_pictures[room[place][1]] + count > row_pictures:
            place += 1
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = row_tokens, len(rows)
            rows.append([])
            used_pictures.append(0)
        rows[row].append(record)
        used_pictures[row] += count
        bisect.insort(room, (free - length, row))
    return rows


def bucket_lengths(tokens: np.ndarray, longest: int) -> list[int]:
    """The BUCKETS rising row lengths, multiples of BUCKET_STEP up to `longest`, that pad these records the least."""
    rounded = np.minimum(-(-tokens[tokens > 0] // BUCKET_STEP) * BUCKET_STEP, longest)
    lengths, counts = np.unique(rounded, return_counts=True)
    below = [0, *np.cumsum(counts).tolist()]
    # best[j]: the fewest tokens in rows for the records up to lengths[j - 1], and the row lengths for that.
    best: list[tuple[float, list[int]]] = [(0, []), *[(math.inf, [])] * len(lengths)]
    for _ in range(BUCKETS):
        for j in range(len(lengths), 0, -1):
            length = int(lengths[j - 1])
            ways = ((best[i][0] + (below[j] - below[i]) * length, [*best[i][1], length]) for i in range(j))
            best[j] = min(best[j], *ways)
    return best[-1][1]


def _take(queue: list[Row], pictures: np.ndarray, shape: BatchShape) -> list[Row]:
    """Removes a batch from the queue: its first rows, but those whose pictures no longer fit wait for the next."""
    taken: list[Row] = []
    passed: list[Row] = []
    left = shape.pictures
    while queue and len(taken) < shape.rows:
        row = queue.pop(0)
        count = int(pictures[row].sum())
        if count <= left:
            taken.append(row)
            left -= count
        else:
            passed.append(row)
    queue[:0] = passed
    return taken
