"""The live batch of an engine: rows that replies take and leave, in arrays that are as large as what is live.

The arrays hold R rows of S slots, R and S each one of a few sizes, so decode steps read little that is not in use and
there are few programs. A reply that comes in is written into a free row; when rows or slots run out, or far fewer would
do, the arrays are moved to the next size, one array after the other. Which replies those are is the engine's business.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenvl_jax.inference.batch_programs import (
    MOST_SPECULATING,
    RECENT,
    BatchPrograms,
    Prefilled,
    but_recent,
    each,
)
from qwenvl_jax.inference.steps import CHUNK, Grown, Past


class LiveBatch:
    """Rows of replies in progress, in arrays of the sizes that there are programs for. Not for several threads."""

    def __init__(self, programs: BatchPrograms):
        self._programs = programs

    def start(self) -> None:
        """An empty batch of the smallest size."""
        rows = self._programs.row_sizes[0]
        self._past, self._state, self._fixed = self._programs.zeros(rows, self._programs.slot_sizes[rows][0])
        self.replies: list[Any] = [None] * rows  # who has which row
        self._prompts = np.zeros(rows, np.int32)  # tokens of the prompts
        self._most = np.zeros(rows, np.int32)  # the most slots that a row can have filled by now
        self._used = 0  # recent slots that have been written
        self._asked = 0  # tokens that each reply could have grown by since the start

    @property
    def most(self) -> int:
        """How many replies there may be."""
        return self._programs.row_sizes[-1]

    @property
    def live(self) -> np.ndarray:
        """bool [R], the rows that are taken."""
        return np.array([reply is not None for reply in self.replies])

    @property
    def filled(self) -> int:
        """Slots in use, over all rows."""
        return int(np.sum(self._filled()))

    @property
    def size(self) -> tuple[int, int]:
        """R and S."""
        return self._past.shape

    def put(self, reply: Any, one: Prefilled, ids: np.ndarray) -> int:
        """Takes in a reply to the prompt `ids`. There must be fewer than `most`. Returns a mark for `note`."""
        self._fit(coming=1, slots=one.past.shape[1])
        if not self.live.any():
            self._used = 0
        row = self.replies.index(None)
        place = self._programs.place[*self.size, one.past.shape[1]]
        self._past = each(place, (self._past, one.past), np.int32(row))
        state = but_recent(one.state)
        if self._programs.drafts:
            history = np.zeros((1, self._programs.longest), np.int32)
            history[0, : len(ids)] = ids
            state = state._replace(history=history)
        ours, theirs = (but_recent(self._state), self._fixed), (state, one.fixed)
        small, self._fixed = self._programs.join[len(self.replies)](ours, theirs, np.int32(row))
        self._state = small._replace(recent_k=self._state.recent_k, recent_v=self._state.recent_v)
        self.replies[row], self._prompts[row], self._most[row] = reply, len(ids), len(ids)
        return self._asked

    def allow(self, reply: Any, tokens: np.ndarray) -> None:
        """What may come next in a reply that is constrained: bool [V]."""
        controls = self._fixed.controls
        row = np.int32(self.replies.index(reply))
        allowed = self._programs.allow[len(self.replies)](controls.allowed, tokens[None], row)
        self._fixed = self._fixed._replace(controls=controls._replace(allowed=allowed))

    def drop(self, reply: Any) -> None:
        """Gives up the row of a reply."""
        row = self.replies.index(reply)
        self.replies[row] = None

    def clear(self) -> None:
        """Sets to zero what no reply has any more: no mask hides what is no number."""
        live = self.live
        clear = self._programs.clear
        self._past = each(clear[self.size], [self._past], live)
        recent = each(clear[self.size[0], RECENT], [Past(self._state.recent_k, self._state.recent_v)], live)
        self._state = self._state._replace(recent_k=recent.k, recent_v=recent.v)

    def decode(self, steps: int, speculate: bool = False) -> tuple[Grown, list[Any], list[int]]:
        """Runs so many steps for every reply. Returns what they add, to which replies, and marks for `note`.

        speculate: whether steps may add drafts; a batch of many rows does not.
        """
        self._fit()
        rows = len(self.replies)
        width = 1 + self._programs.drafts if speculate and rows <= MOST_SPECULATING else 1
        if self._used + width > CHUNK:
            self._flush_recent()
        start = self._used
        self._used = start + min(steps, (CHUNK - start) // width) * width
        self._asked += self._used - start
        self._most += np.where(self.live, self._used - start, 0).astype(np.int32)
        arguments = self._past, self._fixed, np.int32(start), np.int32(self._used), ~self.live
        program = self._programs.decode if width == 1 else self._programs.speculate
        self._state, grown = program[self.size](self._programs.leaves, *arguments, state=self._state)
        return grown, list(self.replies), [self._asked] * rows

    def note(self, reply: Any, generated: int, mark: int) -> None:
        """A reply had so many tokens after the call that `mark` came of; what has been asked for since may add some."""
        row = self.replies.index(reply)
        self._most[row] = self._prompts[row] + generated - 1 + self._asked - mark

    def _filled(self) -> np.ndarray:
        return np.where(self.live, self._most, 0)

    def _fit(self, coming: int = 0, slots: int = 0) -> None:
        """Brings the arrays to a size for the replies, `coming` more, and `slots` slots in each.

        A size is left for a smaller one only where there is some room in that, lest it change with every reply.
        """
        count = int(np.sum(self.live)) + coming
        if count > len(self.replies):
            self._to_rows(_least(self._programs.row_sizes, count))
        elif (roomy := _least(self._programs.row_sizes, 2 * count if count > 1 else 1)) < len(self.replies):
            self._to_rows(roomy)
        needed, sizes = max(int(np.max(self._filled())) + CHUNK, slots), self._programs.slot_sizes[len(self.replies)]
        if needed > self.size[1]:
            self._to_slots(_least(sizes, needed))
        elif (roomy := _least(sizes, needed + CHUNK)) < self.size[1]:
            self._to_slots(roomy)

    def _flush_recent(self) -> None:
        state = self._state
        flush = self._programs.flush[self.size]
        self._past = each(flush, (self._past, Past(state.recent_k, state.recent_v)), state.lengths, state.taken)
        lengths, taken = self._programs.settle[len(self.replies)](state.lengths, state.taken)
        self._state = state._replace(lengths=lengths, taken=taken)
        self._used = 0

    def _to_rows(self, rows: int) -> None:
        """Changes R by way of the sizes between, with the replies moved to the front."""
        while len(self.replies) != rows:
            index = np.flatnonzero(self.live).astype(np.int32)
            size, count = _next(self._programs.row_sizes, len(self.replies), rows), len(index)
            self._to_slots(_least(self._programs.slot_sizes[size], self.size[1]))
            index = np.pad(index, (0, size - count), constant_values=-1)
            recent = Past(self._state.recent_k, self._state.recent_v)
            for_past = self._programs.resize[self.size[0], self.size[1], size, self.size[1]]
            for_recent = self._programs.resize[self.size[0], RECENT, size, RECENT]
            small, self._fixed = self._programs.take[self.size[0], size]((but_recent(self._state), self._fixed), index)
            recent = each(for_recent, [recent], index)
            self._past = each(for_past, [self._past], index)
            self._state = small._replace(recent_k=recent.k, recent_v=recent.v)
            self._prompts, self._most = (np.where(index < 0, 0, old[index]) for old in (self._prompts, self._most))
            self.replies = [reply for reply in self.replies if reply is not None] + [None] * (size - count)

    def _to_slots(self, slots: int) -> None:
        while self.size[1] != slots:
            rows, old = self.size
            every = np.arange(rows, dtype=np.int32)
            resize = self._programs.resize[rows, old, rows, _next(self._programs.slot_sizes[rows], old, slots)]
            self._past = each(resize, [self._past], every)


def _least(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that is enough, or the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def _next(sizes: Sequence[int], size: int, wanted: int) -> int:
    return sizes[sizes.index(size) + (1 if wanted > size else -1)]
