"""The live batch of an engine: rows that replies take and leave, in arrays that are as large as what is live.

The arrays hold R rows of S slots, R and S each one of a few sizes, so decode steps read little that is not in use and
there are few programs. A reply that comes in is written into a free row; when rows or slots run out, or far fewer would
do, the arrays are moved to the next size, one array after the other. Which replies those are is the engine's business.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.inference import steps
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.programs import Program
from qwenvl_jax.inference.steps import CHUNK, Fixed, Grown, Past, State
from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.int8_tokens import TokenArray

MOST_SPECULATING = 8  # rows; a larger batch keeps the device busy with what is certain
RECENT = "recent"  # in the place of a number of slots, where the arrays are those of the recent part


class Prefilled(NamedTuple):
    """A reply that has its first token: a batch of one row, from `Generator.prefill`."""

    past: Past  # T slots
    state: State
    fixed: Fixed


class LiveBatch:
    """Rows of replies in progress. Not for several threads.

    sizes: what S may be, ascending, for each R. The largest S is that of all, and what few rows may have, more may.
    drafts: tokens that a step of a batch of few rows may add beside the next one, 0 for none.
    """

    def __init__(self, generator: Generator, sizes: Mapping[int, Sequence[int]], drafts: int = 0):
        self._slot_sizes, self._row_sizes = sizes, tuple(sorted(sizes))
        self._longest = sizes[self._row_sizes[0]][-1]
        self._generator, self._drafts = generator, drafts
        counter = generator.programs
        self._place = Program(_place, counter, Layout.tokens, donate_argnums=0)
        self._flush = Program(_flush, counter, Layout.tokens, donate_argnums=0)
        self._resize = Program(_resize, counter, Layout.tokens, static_argnames="slots")
        self._join = Program(_join, counter, Layout.batch, donate_argnums=0)
        self._take = Program(_take, counter, Layout.batch)
        self._allow = Program(_join, counter, Layout.rows, donate_argnums=0)
        self._clear = Program(_clear, counter, Layout.tokens, donate_argnums=0)
        self._settle = Program(steps.settled, counter, Layout.rows)
        speculate = partial(steps.decode, drafts=drafts)
        self._speculate = generator.program(speculate, Layout.batch, donate_argnames="state")

    def compile(self, replies: dict[int, Prefilled]) -> list[Callable[[], None]]:
        """What compiles all programs. replies: the shapes of a prefilled reply, by its number of slots T."""
        self._shape = next(iter(replies.values()))
        if self._drafts:
            history = jax.ShapeDtypeStruct((1, self._longest), np.int32)
            self._shape = self._shape._replace(state=self._shape.state._replace(history=history))
        tasks = []
        for rows in self._row_sizes:
            tasks += self._compile_rows(rows)
            for slots in self._slot_sizes[rows]:
                tasks += self._compile_size(
                    rows, slots, [reply for length, reply in replies.items() if length <= slots]
                )
        return tasks

    def start(self) -> None:
        """An empty batch of the smallest size."""
        rows = self._row_sizes[0]
        slots = self._slot_sizes[rows][0]
        self._past, self._state, self._fixed = self._generator.layout.zeros(self._sized(rows, slots))
        self.replies: list[Any] = [None] * rows  # who has which row
        self._prompts = np.zeros(rows, np.int32)  # tokens of the prompts
        self._most = np.zeros(rows, np.int32)  # the most slots that a row can have filled by now
        self._used = 0  # recent slots that have been written
        self._asked = 0  # tokens that each reply could have grown by since the start

    @property
    def most(self) -> int:
        """How many replies there may be."""
        return self._row_sizes[-1]

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
        place = self._place[*self.size, one.past.shape[1]]
        self._past = each(place, (self._past, one.past), np.int32(row))
        state = _but_recent(one.state)
        if self._drafts:
            history = np.zeros((1, self._longest), np.int32)
            history[0, : len(ids)] = ids
            state = state._replace(history=history)
        ours, theirs = (_but_recent(self._state), self._fixed), (state, one.fixed)
        small, self._fixed = self._join[len(self.replies)](ours, theirs, np.int32(row))
        self._state = small._replace(recent_k=self._state.recent_k, recent_v=self._state.recent_v)
        self.replies[row], self._prompts[row], self._most[row] = reply, len(ids), len(ids)
        return self._asked

    def allow(self, reply: Any, tokens: np.ndarray) -> None:
        """What may come next in a reply that is constrained: bool [V]."""
        controls = self._fixed.controls
        row = np.int32(self.replies.index(reply))
        allowed = self._allow[len(self.replies)](controls.allowed, tokens[None], row)
        self._fixed = self._fixed._replace(controls=controls._replace(allowed=allowed))

    def drop(self, reply: Any) -> None:
        """Gives up the row of a reply."""
        row = self.replies.index(reply)
        self.replies[row] = None

    def clear(self) -> None:
        """Sets to zero what no reply has any more: no mask hides what is no number."""
        live = self.live
        self._past = each(self._clear[self.size], [self._past], live)
        recent = each(self._clear[self.size[0], RECENT], [Past(self._state.recent_k, self._state.recent_v)], live)
        self._state = self._state._replace(recent_k=recent.k, recent_v=recent.v)

    def decode(self, steps: int, speculate: bool = False) -> tuple[Grown, list[Any], int]:
        """Runs so many steps for every reply. Returns what they add, to which replies, and a mark for `note`.

        speculate: whether steps may add drafts; a batch of many rows does not.
        """
        self._fit()
        rows = len(self.replies)
        width = 1 + self._drafts if speculate and self._drafts and rows <= MOST_SPECULATING else 1
        if self._used + width > CHUNK:
            self._flush_recent()
        start = self._used
        self._used = start + min(steps, (CHUNK - start) // width) * width
        self._asked += self._used - start
        self._most += np.where(self.live, self._used - start, 0).astype(np.int32)
        arguments = self._past, self._fixed, np.int32(start), np.int32(self._used), ~self.live
        program = self._generator.decode_steps if width == 1 else self._speculate
        self._state, grown = program[self.size](self._generator.leaves, *arguments, state=self._state)
        return grown, list(self.replies), self._asked

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
            self._to_rows(_least(self._row_sizes, count))
        elif (roomy := _least(self._row_sizes, 2 * count if count > 1 else 1)) < len(self.replies):
            self._to_rows(roomy)
        needed, sizes = max(int(np.max(self._filled())) + CHUNK, slots), self._slot_sizes[len(self.replies)]
        if needed > self.size[1]:
            self._to_slots(_least(sizes, needed))
        elif (roomy := _least(sizes, needed + CHUNK)) < self.size[1]:
            self._to_slots(roomy)

    def _flush_recent(self) -> None:
        state = self._state
        flush = self._flush[self.size]
        self._past = each(flush, (self._past, Past(state.recent_k, state.recent_v)), state.lengths, state.taken)
        lengths, taken = self._settle[len(self.replies)](state.lengths, state.taken)
        self._state = state._replace(lengths=lengths, taken=taken)
        self._used = 0

    def _to_rows(self, rows: int) -> None:
        """Changes R by way of the sizes between, with the replies moved to the front."""
        while len(self.replies) != rows:
            index = np.flatnonzero(self.live).astype(np.int32)
            size, count = _next(self._row_sizes, len(self.replies), rows), len(index)
            self._to_slots(_least(self._slot_sizes[size], self.size[1]))
            index = np.pad(index, (0, size - count), constant_values=-1)
            recent = Past(self._state.recent_k, self._state.recent_v)
            for_past = self._resize[self.size[0], self.size[1], size, self.size[1]]
            for_recent = self._resize[self.size[0], RECENT, size, RECENT]
            small, self._fixed = self._take[self.size[0], size]((_but_recent(self._state), self._fixed), index)
            recent = each(for_recent, [recent], index)
            self._past = each(for_past, [self._past], index)
            self._state = small._replace(recent_k=recent.k, recent_v=recent.v)
            self._prompts, self._most = (np.where(index < 0, 0, old[index]) for old in (self._prompts, self._most))
            self.replies = [reply for reply in self.replies if reply is not None] + [None] * (size - count)

    def _to_slots(self, slots: int) -> None:
        while self.size[1] != slots:
            rows, old = self.size
            every = np.arange(rows, dtype=np.int32)
            resize = self._resize[rows, old, rows, _next(self._slot_sizes[rows], old, slots)]
            self._past = each(resize, [self._past], every)

    def _sized(self, rows: int, slots: int) -> tuple[Past, State, Fixed]:
        """The shapes of a batch of this size."""

        def resized(leaf):
            return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

        shapes = with_slots(self._shape.past, slots), self._shape.state, self._shape.fixed
        return self._generator.layout.batch(jax.tree.map(resized, shapes))

    def _compile_rows(self, rows: int) -> list[Callable[[], None]]:
        """The programs for so many rows that do not touch the past."""
        _, state, fixed = self._sized(rows, 1)
        ours, theirs = (_but_recent(state), fixed), (_but_recent(self._shape.state), self._shape.fixed)
        row = jax.ShapeDtypeStruct((), np.int32)
        tasks: list[Callable[[], None]] = [partial(self._join.compile, rows, ours, theirs, row)]
        tasks.append(partial(self._settle.compile, rows, state.lengths, state.taken))
        flags = jax.ShapeDtypeStruct((rows,), bool)
        tasks.append(partial(self._clear.compile, (rows, RECENT), state.recent_k[0], flags))
        allowed = (each_row.controls.allowed for each_row in (fixed, self._shape.fixed))
        tasks.append(partial(self._allow.compile, rows, *allowed, row))
        for other in _neighbours(self._row_sizes, rows):
            index = jax.ShapeDtypeStruct((other,), np.int32)
            tasks.append(partial(self._take.compile, (rows, other), ours, index))
            recent = state.recent_k[0]
            tasks.append(partial(self._resize.compile, (rows, RECENT, other, RECENT), recent, index, slots=CHUNK))
        return tasks

    def _compile_size(self, rows: int, slots: int, replies: Sequence[Prefilled]) -> list[Callable[[], None]]:
        """The programs for a past of this size: decode steps first, the others take no time."""
        past, state, fixed = self._sized(rows, slots)
        array, number = past.k[0], jax.ShapeDtypeStruct((), np.int32)
        places, flags = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (np.int32, bool))

        def moves() -> None:
            self._flush.compile((rows, slots), array, state.recent_k[0], state.lengths, state.taken)
            self._clear.compile((rows, slots), array, flags)
            for reply in replies:
                self._place.compile((rows, slots, reply.past.shape[1]), array, reply.past.k[0], number)
            for other in _neighbours(self._row_sizes, rows):
                if slots in self._slot_sizes[other]:
                    index = jax.ShapeDtypeStruct((other,), np.int32)
                    self._resize.compile((rows, slots, other, slots), array, index, slots=slots)
            for other in _neighbours(self._slot_sizes[rows], slots):
                self._resize.compile((rows, slots, rows, other), array, places, slots=other)

        arguments = self._generator.leaves, past, fixed, number, number, flags
        programs = [self._generator.decode_steps]
        if self._drafts and rows <= MOST_SPECULATING:
            programs.append(self._speculate)
        return [*(partial(program.compile, (rows, slots), *arguments, state=state) for program in programs), moves]


def each(function: Callable[..., Any], pasts: Sequence[Past], *rest: Any) -> Past:
    """A past of what the function makes of each array, its counterparts in the other pasts, and the rest."""
    sides = zip(*pasts, strict=True)
    return Past(*([function(*arrays, *rest) for arrays in zip(*side, strict=True)] for side in sides))


def with_slots(past: Past, slots: int) -> Past:
    """The shapes of a past with another number of slots."""

    def resized(leaf):
        shape = (*leaf.shape[:2], slots, *leaf.shape[3:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(resized, past)


def _but_recent(state: State) -> State:
    return state._replace(recent_k=[], recent_v=[])


def _least(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that is enough, or the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def _next(sizes: Sequence[int], size: int, wanted: int) -> int:
    return sizes[sizes.index(size) + (1 if wanted > size else -1)]


def _neighbours(sizes: Sequence[int], size: int) -> list[int]:
    place = sizes.index(size)
    return [*sizes[max(place - 1, 0) : place], *sizes[place + 1 : place + 2]]


# Below: what the programs compute.


def _place(old: TokenArray, new: TokenArray, row: jax.Array) -> TokenArray:
    """new [1, N, T, H] in the first slots of a row of old [R, N, S, H]."""

    def placed(old, new):
        return jax.lax.dynamic_update_slice(old, new, (row, *[0] * (old.ndim - 1)))

    return jax.tree.map(placed, old, new)


def _flush(old: TokenArray, recent: jax.Array, lengths: jax.Array, taken: jax.Array) -> TokenArray:
    return kv_cache.flushed(old, recent, lengths, taken, old.shape[2])


def _resize(old: TokenArray, index: jax.Array, slots: int) -> TokenArray:
    """The rows int [R'] of old [R, N, S, H], with `slots` slots."""
    return kv_cache.resized(_take(old, index), slots)


def _join(ours: Any, theirs: Any, row: jax.Array) -> Any:
    """Arrays [R, ...] with the one row of arrays [1, ...] in the given row."""
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0), ours, theirs)


def _take(ours: Any, index: jax.Array) -> Any:
    """The rows int [R'] of arrays [R, ...]; -1 is a row of zeros."""
    return _clear(jax.tree.map(lambda old: old[index], ours), index >= 0)


def _clear(ours: Any, live: jax.Array) -> Any:
    """Arrays [R, ...] with zeros in the rows that are not live (bool [R])."""
    return jax.tree.map(
        lambda old: jnp.where(jnp.expand_dims(live, range(1, old.ndim)), old, jnp.zeros_like(old)), ours
    )
