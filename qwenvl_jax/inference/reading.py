"""Reads the prompts of an engine's requests: encodes pictures, finds what was read before, computes the rest.

Gives replies with their first tokens, ready to join the live batch. Prompts of one size are read by one call; a long
one, or one that begins like another, by several, and not all of these at once. When that is done is the engine's
business.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from qwenvl_jax.inference import steps
from qwenvl_jax.inference.batch_programs import Prefilled, each, with_slots
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.features import AT_ONCE, PictureFeatures
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.prefixes import Prefix, PrefixCache
from qwenvl_jax.inference.programs import Program
from qwenvl_jax.inference.reply import Reply
from qwenvl_jax.inference.sampling import Controls, SamplingOptions, controls
from qwenvl_jax.inference.steps import Fixed, Grown, Past
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.nn import cache as kv_cache

MOST_TOKENS = 512  # read by one `PromptReader.read`, padding included
TOGETHER = (1, 4)  # prompts read by one call: each is one program more for every size
EXTENSIONS = (64, 256)  # tokens read by one call after a known beginning


class Piece(NamedTuple):
    """Tokens `start` to `end` of a prompt, read by a call for `size` tokens."""

    start: int
    end: int
    size: int


class Begun(NamedTuple):
    """A prompt of which some has been read, and what is left of it."""

    reply: Reply
    past: Past
    pieces: list[Piece]


class Read(NamedTuple):
    """What a `PromptReader.read` has given: nothing but the number of tokens while a prompt is only begun."""

    tokens: int  # computed, padding included
    prompts: list[Prefilled]
    grown: Grown | None


class PromptReader:
    """sizes: lengths that prompts are padded to, ascending. together: the most prompts that one call may read.
    pictures: how many are kept; prefixes: slots kept; int8: whether keys and values are stored in 8 bits as soon as
    they have been computed.

    Not for several threads.
    """

    def __init__(
        self, generator: Generator, sizes: Sequence[int], together: int, pictures: int, prefixes: int, int8: bool
    ):
        self.features = PictureFeatures(generator, pictures)
        self.prefixes = PrefixCache(prefixes)
        self._generator, self._sizes = generator, tuple(sizes)
        self._rows = {
            size: [rows for rows in TOGETHER if rows <= together and rows * size <= MOST_TOKENS]
            for size in sizes
            if size <= MOST_TOKENS
        }
        self._queries = generator.config.visual.n_queries
        self._room = sizes[-1] + EXTENSIONS[-1]  # the last extension may reach behind the longest prompt
        self._whole = generator.program(steps.prefill_each, Layout.batch)
        self._extend = generator.program(steps.extend, Layout.batch, donate_argnames="past")
        self._resize = Program(kv_cache.resized, generator.programs, Layout.tokens, static_argnames="slots")
        self._in_int8 = Program(steps.in_int8, generator.programs, Layout.batch) if int8 else None
        self._begun: Begun | None = None

    def compile(self) -> tuple[list[Callable[[], None]], dict[int, Prefilled]]:
        """What compiles all programs, and the shapes that a prompt of each size will then have, by size."""
        shapes: dict[int, Prefilled] = {}
        smallest = self._sizes[0]

        def whole(size: int) -> None:
            past, state, fixed = self._compile_whole(size, 1)
            if self._in_int8 is not None:
                self._in_int8.compile(size, past)
                past = self._generator.layout.batch(self._in_int8.result(size))
            for slots in (size,) if size > smallest else (size, *(long for long in self._sizes if long > MOST_TOKENS)):
                shapes[slots] = Prefilled(with_slots(past, slots), state, fixed)
                wide = with_slots(past, self._room)
                self._resize.compile((slots, self._room), shapes[slots].past.k[0], slots=self._room)
                self._resize.compile((self._room, slots), wide.k[0], slots=slots)
            if size == smallest:
                self._empty = Prefix(self._generator.layout.zeros(past), 0)
                for extension in EXTENSIONS:
                    self._compile_extension(extension, wide, fixed)

        def group(size: int, rows: int) -> None:
            self._compile_whole(size, rows)

        groups = [(size, rows) for size, counts in self._rows.items() for rows in counts]
        counts = {rows * self._pictures_in(size) for size, rows in groups}
        counts |= {self._pictures_in(size, 2) for size in EXTENSIONS}
        return [
            *self.features.compile(sorted(counts)),
            *(partial(whole, size) for size in self._rows),
            *(partial(group, size, rows) for size, rows in groups if rows > 1),
        ], shapes

    def together(self, waiting: Sequence[Reply], most: int, budget: float = math.inf) -> list[Reply]:
        """The first of those that wait and others, `most` at the most, that one call may read with it.

        None at all where that would take more than `budget` tokens. Prompts that begin alike are not read together:
        what the first has read saves the others the most of their own.
        """
        first = self._beginning(waiting[0])
        length = len(waiting[0].request.prompt.input_ids)
        if first is not None:
            needed = sum(piece.size for piece in _pieces(first.length, length))
            return [waiting[0]] if min(needed, MOST_TOKENS) <= budget else []
        size = self._size(length)
        found: list[Reply] = []
        begins: set[bytes] = set()
        for reply in waiting:
            alike = self._size(len(reply.request.prompt.input_ids)) == size and begins.isdisjoint(reply.blocks[:1])
            if alike and self._beginning(reply) is None:
                found.append(reply)
                begins.update(reply.blocks[:1])
        most = min(most, len(found))
        return found[: max((rows for rows in self._rows[size] if rows <= most and rows * size <= budget), default=0)]

    def lacks_pictures(self, replies: Sequence[Reply]) -> bool:
        """Whether the next `read` of these needs pictures that have not been encoded."""
        return any(key not in self.features for reply in replies for key, _ in self._needed(reply))

    def encode(self, replies: Sequence[Reply]) -> bool:
        """Encodes pictures that the next `read` lacks, as many as may be at once. Whether there were any."""
        missing: dict[bytes, np.ndarray] = {}
        for reply in replies:
            adapter = reply.request.adapter
            for key, pixels in self._needed(reply):
                if len(missing) < AT_ONCE[0] and key not in missing and key not in self.features:
                    missing[key] = pixels
                    reply.encoded += 1
            if missing and self._generator.adapts_pictures:
                break  # the next one may have another adapter
        if missing:
            self.features.encode(list(missing), np.stack(list(missing.values())), adapter)
        return bool(missing)

    def read(self, replies: Sequence[Reply]) -> Read:
        """Reads prompts that are read `together`, or some more of the one."""
        while self.encode(replies):
            pass
        beginning = self._beginning(replies[0])
        read = self._read_whole(replies) if beginning is None else self._go_on(replies[0], beginning)
        for reply, prompt in zip(replies, read.prompts, strict=False):
            self.features.count(len(reply.request.picture_keys), reply.encoded)
            self.prefixes.count(len(reply.request.prompt.input_ids), reply.cached)
            self.prefixes.keep(reply.blocks, prompt.past)
        self.features.forget()
        return read

    def _size(self, length: int) -> int:
        return next(size for size in self._sizes if size >= length)

    def _beginning(self, reply: Reply) -> Prefix | None:
        """What is known of a prompt, if it goes on from there; None for one that is read as a whole."""
        if self._begun is not None and self._begun.reply is reply:
            return Prefix(self._begun.past, self._begun.pieces[0].start)
        length = len(reply.request.prompt.input_ids)
        size, prefix = self._size(length), self.prefixes.find(reply.blocks, length)
        if size not in self._rows:
            return prefix or self._empty
        saves = prefix is not None and sum(piece.size for piece in _pieces(prefix.length, length)) < size
        return prefix if saves else None

    def _needed(self, reply: Reply) -> list[tuple[bytes, np.ndarray]]:
        """The pictures in the tokens that are read next: their keys, and float32 [3, S, S]."""
        request, beginning = reply.request, self._beginning(reply)
        start = 0 if beginning is None else beginning.length
        slots = request.prompt.image_slots[start : start + MOST_TOKENS]
        pictures = np.unique(slots[slots >= 0] // self._queries)
        return [(request.picture_keys[picture], request.prompt.pixels[picture]) for picture in pictures]

    def _read_whole(self, replies: Sequence[Reply]) -> Read:
        requests = [reply.request for reply in replies]
        size, rows = self._size(len(requests[0].prompt.input_ids)), len(requests)
        keys = [key for request in requests for key in request.picture_keys]
        features = self.features.stack(keys, rows * self._pictures_in(size))
        batch = self._generator.batch([one.prompt for one in requests], room=1, features=features, length=size)
        before = np.cumsum([0, *(len(one.picture_keys) for one in requests[:-1])], dtype=np.int32)[:, None]
        slots = np.where(batch.slots < 0, batch.slots, batch.slots + before * self._queries)
        prompts, grown = self._whole[size, rows](
            self._generator.leaves, batch.ids, slots, batch.lengths, features,
            jax.tree.map(lambda *one: np.concatenate(one), *(reply.controls for reply in replies)),
            frequencies(self._generator.config, batch.lengths), np.zeros(rows, np.int32), np.zeros(rows, bool),
            self._generator.chosen(*(one.adapter for one in requests)),
        )  # fmt: skip
        if self._in_int8 is not None:
            prompts = [(self._in_int8[size](past), *rest) for past, *rest in prompts]
        return Read(rows * size, [Prefilled(*prompt) for prompt in prompts], grown)

    def _go_on(self, reply: Reply, beginning: Prefix) -> Read:
        """Reads a prompt from its beginning on, as much as may be at once."""
        begun, self._begun = self._begun, None
        length = len(reply.request.prompt.input_ids)
        if begun is None or begun.reply is not reply:
            self.prefixes.use(beginning)
            reply.cached = beginning.length
            past = each(self._resize[beginning.past.shape[1], self._room], [beginning.past])
            begun = Begun(reply, past, _pieces(beginning.length, length))
        past, tokens = begun.past, 0
        for place, piece in enumerate(begun.pieces):
            if tokens + piece.size > MOST_TOKENS:
                self._begun = Begun(reply, past, begun.pieces[place:])
                return Read(tokens, [], None)
            past, state, fixed, grown = self._read_piece(reply, piece, past)
            tokens += piece.size
        past = each(self._resize[self._room, self._size(length)], [past])
        return Read(tokens, [Prefilled(past, state, fixed)], grown)

    def _read_piece(self, reply: Reply, piece: Piece, past: Past) -> tuple:
        """What `steps.extend` gives. Uses up the past."""
        prompt, (start, end, size) = reply.request.prompt, piece
        ids, slots = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
        ids[0, : end - start], slots[0, : end - start] = prompt.input_ids[start:end], prompt.image_slots[start:end]
        pictures = np.unique(slots[slots >= 0] // self._queries)
        first = pictures[0] if len(pictures) else 0  # those of a piece follow one another
        slots = np.where(slots < 0, slots, slots - first * self._queries).astype(np.int32)
        keys = [reply.request.picture_keys[picture] for picture in pictures]
        in_prompt = np.zeros((1, self._generator.config.vocab_size), bool)
        in_prompt[0, prompt.input_ids] = True
        return self._extend[size](
            self._generator.leaves, ids, slots, np.array([end - start], np.int32),
            self.features.stack(keys, self._pictures_in(size, 2)), reply.controls,
            frequencies(self._generator.config, [len(prompt.input_ids)]), in_prompt, np.array([start], np.int32),
            np.zeros(1, bool), self._generator.chosen(reply.request.adapter), past=past,
        )  # fmt: skip

    def _pictures_in(self, length: int, cut: int = 0) -> int:
        """How many pictures so many tokens can have, `cut` of them in part; one at least, which text has nowhere."""
        return max(length // (self._queries + 2) + cut, 1)  # with the tags around it

    def _compile_whole(self, size: int, rows: int) -> tuple:
        """Returns the shapes of the first row: past, state and fixed."""
        ids, number = jax.ShapeDtypeStruct((rows, size), np.int32), jax.ShapeDtypeStruct((rows,), np.int32)
        rotary = frequencies(self._generator.config, [1] * rows)
        features = self._generator.features(rows * self._pictures_in(size))
        self._whole.compile(
            (size, rows), self._generator.leaves, ids, ids, number, features, self._options(rows), rotary, number,
            jax.ShapeDtypeStruct((rows,), bool), self._generator.chosen(*[0] * rows),
        )  # fmt: skip
        return self._generator.layout.batch(self._whole.result((size, rows)))[0][0]

    def _compile_extension(self, size: int, past: Past, fixed: Fixed) -> None:
        ids, number = jax.ShapeDtypeStruct((1, size), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
        features = self._generator.features(self._pictures_in(size, 2))
        rotary = frequencies(self._generator.config, [1])
        in_prompt = jax.ShapeDtypeStruct(fixed.in_prompt.shape, bool)
        self._extend.compile(
            size, self._generator.leaves, ids, ids, number, features, self._options(1), rotary, in_prompt, number,
            jax.ShapeDtypeStruct((1,), bool), self._generator.chosen(0), past=past,
        )  # fmt: skip

    def _options(self, rows: int) -> Controls:
        """Some, of the shapes that all have."""
        return controls([SamplingOptions()] * rows, [], self._generator.config.vocab_size)


def _pieces(start: int, length: int) -> list[Piece]:
    """What is left of a prompt, cut into pieces of the sizes there are programs for."""
    pieces = []
    while start < length:
        left = length - start
        size = EXTENSIONS[1] if left > 2 * EXTENSIONS[0] else EXTENSIONS[0]
        pieces.append(Piece(start, min(start + size, length), size))
        start += size
    return pieces
