"""The compiled programs of a live batch, by its sizes: decode steps, and what moves replies in and out and about.

Several batches may share them. When which of them is called is the business of `slots.py`.
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
from qwenvl_jax.inference.steps import CHUNK, Fixed, Past, State
from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.int8_tokens import TokenArray

MOST_SPECULATING = 8  # rows; a larger batch keeps the device busy with what is certain
RECENT = "recent"  # in the place of a number of slots, where the arrays are those of the recent part


class Prefilled(NamedTuple):
    """A reply that has its first token: a batch of one row, from `Generator.prefill`."""

    past: Past  # T slots
    state: State
    fixed: Fixed


class BatchPrograms:
    """Those of batches of R rows of S slots. Each is called as `programs.name[sizes](...)`.

    sizes: what S may be, ascending, for each R. The largest S is that of all, and what few rows may have, more may.
    drafts: tokens that a step of a batch of few rows may add beside the next one, 0 for none.
    """

    def __init__(self, generator: Generator, sizes: Mapping[int, Sequence[int]], drafts: int = 0):
        self.slot_sizes, self.row_sizes = sizes, tuple(sorted(sizes))
        self.longest = sizes[self.row_sizes[0]][-1]
        self.drafts, self.decode = drafts, generator.decode_steps
        self._generator = generator
        counter = generator.programs
        self.place = Program(_place, counter, Layout.tokens, donate_argnums=0)
        self.flush = Program(_flush, counter, Layout.tokens, donate_argnums=0)
        self.resize = Program(_resize, counter, Layout.tokens, static_argnames="slots")
        self.join = Program(_join, counter, Layout.batch, donate_argnums=0)
        self.take = Program(_take, counter, Layout.batch)
        self.allow = Program(_join, counter, Layout.rows, donate_argnums=0)
        self.clear = Program(_clear, counter, Layout.tokens, donate_argnums=0)
        self.settle = Program(steps.settled, counter, Layout.rows)
        speculate = partial(steps.decode, drafts=drafts)
        self.speculate = generator.program(speculate, Layout.batch, **generator.step_options)

    @property
    def leaves(self) -> list[jax.Array]:
        """The model's arrays, the first argument of `decode` and `speculate`."""
        return self._generator.leaves

    def zeros(self, rows: int, slots: int) -> Any:
        """An empty batch of this size: past, state, fixed."""
        return self._generator.layout.zeros(self.shapes(rows, slots))

    def compile(self, replies: dict[int, Prefilled]) -> list[Callable[[], None]]:
        """What compiles all programs. replies: the shapes of a prefilled reply, by its number of slots T."""
        self._shape = next(iter(replies.values()))
        if self.drafts:
            history = jax.ShapeDtypeStruct((1, self.longest), np.int32)
            self._shape = self._shape._replace(state=self._shape.state._replace(history=history))
        tasks = []
        for rows in self.row_sizes:
            tasks += self._compile_rows(rows)
            for slots in self.slot_sizes[rows]:
                tasks += self._compile_size(
                    rows, slots, [reply for length, reply in replies.items() if length <= slots]
                )
        return tasks

    def shapes(self, rows: int, slots: int) -> tuple[Past, State, Fixed]:
        """The shapes of a batch of this size."""

        def resized(leaf):
            return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

        shapes = with_slots(self._shape.past, slots), self._shape.state, self._shape.fixed
        return self._generator.layout.batch(jax.tree.map(resized, shapes))

    def _compile_rows(self, rows: int) -> list[Callable[[], None]]:
        """The programs for so many rows that do not touch the past."""
        _, state, fixed = self.shapes(rows, 1)
        ours, theirs = (but_recent(state), fixed), (but_recent(self._shape.state), self._shape.fixed)
        row = jax.ShapeDtypeStruct((), np.int32)
        tasks: list[Callable[[], None]] = [partial(self.join.compile, rows, ours, theirs, row)]
        tasks.append(partial(self.settle.compile, rows, state.lengths, state.taken))
        flags = jax.ShapeDtypeStruct((rows,), bool)
        tasks.append(partial(self.clear.compile, (rows, RECENT), state.recent_k[0], flags))
        allowed = (each_row.controls.allowed for each_row in (fixed, self._shape.fixed))
        tasks.append(partial(self.allow.compile, rows, *allowed, row))
        for other in _neighbours(self.row_sizes, rows):
            index = jax.ShapeDtypeStruct((other,), np.int32)
            tasks.append(partial(self.take.compile, (rows, other), ours, index))
            recent = state.recent_k[0]
            tasks.append(partial(self.resize.compile, (rows, RECENT, other, RECENT), recent, index, slots=CHUNK))
        return tasks

    def _compile_size(self, rows: int, slots: int, replies: Sequence[Prefilled]) -> list[Callable[[], None]]:
        """The programs for a past of this size: decode steps first, the others take no time."""
        past, state, fixed = self.shapes(rows, slots)
        array, number = past.k[0], jax.ShapeDtypeStruct((), np.int32)
        places, flags = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (np.int32, bool))

        def moves() -> None:
            self.flush.compile((rows, slots), array, state.recent_k[0], state.lengths, state.taken)
            self.clear.compile((rows, slots), array, flags)
            for reply in replies:
                self.place.compile((rows, slots, reply.past.shape[1]), array, reply.past.k[0], number)
            for other in _neighbours(self.row_sizes, rows):
                if slots in self.slot_sizes[other]:
                    index = jax.ShapeDtypeStruct((other,), np.int32)
                    self.resize.compile((rows, slots, other, slots), array, index, slots=slots)
            for other in _neighbours(self.slot_sizes[rows], slots):
                self.resize.compile((rows, slots, rows, other), array, places, slots=other)

        arguments = self.leaves, past, fixed, number, number, flags
        programs = [self.decode]
        if self.drafts and rows <= MOST_SPECULATING:
            programs.append(self.speculate)
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


def but_recent(state: State) -> State:
    return state._replace(recent_k=[], recent_v=[])


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
