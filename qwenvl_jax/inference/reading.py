"""Reads the prompts of an engine's requests: encodes pictures, finds what was read before, computes the rest.

Gives a reply with its first token, ready to join the live batch. When that is done is the engine's business.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from qwenvl_jax.inference import steps
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.features import AT_ONCE, PictureFeatures
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.prefixes import Prefix, PrefixCache
from qwenvl_jax.inference.programs import Program
from qwenvl_jax.inference.reply import Reply
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.inference.slots import Prefilled, each, with_slots
from qwenvl_jax.inference.steps import Fixed, Grown, Past, State
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.nn import cache as kv_cache

EXTENSIONS = (64, 256)  # tokens read by one call after a known prefix


class Piece(NamedTuple):
    """Tokens `start` to `end` of a prompt, read by a call for `size` tokens."""

    start: int
    end: int
    size: int


class PromptReader:
    """sizes: lengths that prompts are padded to, ascending. pictures: how many are kept; prefixes: slots kept; int8:
    whether keys and values are stored in 8 bits from then on when a prompt has been read.

    Not for several threads.
    """

    def __init__(self, generator: Generator, sizes: Sequence[int], pictures: int, prefixes: int, int8: bool):
        self.features = PictureFeatures(generator, pictures)
        self.prefixes = PrefixCache(prefixes)
        self._generator, self._sizes = generator, tuple(sizes)
        self._queries = generator.config.visual.n_queries
        self._room = sizes[-1] + EXTENSIONS[-1]  # the last extension may reach behind the longest prompt
        self._extend = generator.program(steps.extend, Layout.batch, donate_argnames="past")
        self._resize = Program(kv_cache.resized, generator.programs, Layout.tokens, static_argnames="slots")
        self._in_int8 = Program(steps.in_int8, generator.programs, Layout.batch) if int8 else None

    def compile(self) -> tuple[list[Callable[[], None]], dict[int, Prefilled]]:
        """What compiles all programs, and the shapes that a prompt of each size will then have, by size."""
        shapes: dict[int, Prefilled] = {}

        def prefill(size: int) -> None:
            past, state, fixed, _ = self._generator.compile_prefill(size, self._pictures_in(size))
            if self._in_int8 is not None:
                self._in_int8.compile(size, past)
                past = self._generator.layout.batch(self._in_int8.result(size))
            shapes[size] = Prefilled(past, state, fixed)
            wide = with_slots(past, self._room)
            self._resize.compile((size, self._room), past.k[0], slots=self._room)
            self._resize.compile((self._room, size), wide.k[0], slots=size)
            if size == self._sizes[0]:
                for extension in EXTENSIONS:
                    self._compile_extension(extension, wide, fixed)

        counts = {self._pictures_in(size) for size in self._sizes} | {self._pictures_in(size, 2) for size in EXTENSIONS}
        return [*self.features.compile(sorted(counts)), *(partial(prefill, size) for size in self._sizes)], shapes

    def encode(self, reply: Reply) -> bool:
        """Encodes pictures that a prompt lacks, as many as may be at once. Whether there were any."""
        request, prefix = reply.request, self._prefix(reply)
        slots = request.prompt.image_slots[0 if prefix is None else prefix.length :]
        needed = np.unique(slots[slots >= 0] // self._queries)
        keys = [request.picture_keys[picture] for picture in needed]
        missing = self.features.missing(keys)[: AT_ONCE[0]]
        if missing:
            pixels = request.prompt.pixels[needed[missing]]
            self.features.encode([keys[place] for place in missing], pixels, request.adapter)
            reply.encoded += len(missing)
        return bool(missing)

    def read(self, reply: Reply) -> tuple[Prefilled, Grown, int]:
        """The reply with its first token, what that call has given, and the number of tokens computed."""
        while self.encode(reply):
            pass
        length = len(reply.request.prompt.input_ids)
        size = next(size for size in self._sizes if size >= length)
        prefix = self._prefix(reply)
        pieces = [] if prefix is None else _pieces(prefix.length, length)
        computed = sum(piece.size for piece in pieces)
        if prefix is not None and computed < size:
            (past, state, fixed, grown), reply.cached = self._continued(reply, prefix, pieces, size), prefix.length
        else:
            past, state, fixed, grown = self._whole(reply, size)
            computed = size
        self.features.count(len(reply.request.picture_keys), reply.encoded)
        self.prefixes.count(length, reply.cached)
        self.prefixes.keep(reply.blocks, past)
        return Prefilled(past, state, fixed), grown, computed

    def _prefix(self, reply: Reply) -> Prefix | None:
        return self.prefixes.find(reply.blocks, len(reply.request.prompt.input_ids))

    def _whole(self, reply: Reply, size: int) -> tuple[Past, State, Fixed, Grown]:
        request = reply.request
        features = self.features.stack(request.picture_keys, self._pictures_in(size))
        batch = self._generator.batch([request.prompt], room=1, features=features, length=size)
        chosen = self._generator.chosen(request.adapter)
        past, state, fixed, grown = self._generator.prefill(batch, reply.controls, adapter=chosen)
        return past if self._in_int8 is None else self._in_int8[size](past), state, fixed, grown

    def _continued(
        self, reply: Reply, prefix: Prefix, pieces: Sequence[Piece], size: int
    ) -> tuple[Past, State, Fixed, Grown]:
        prompt = reply.request.prompt
        rotary = frequencies(self._generator.config, [len(prompt.input_ids)])
        in_prompt = np.zeros((1, self._generator.config.vocab_size), bool)
        in_prompt[0, prompt.input_ids] = True
        past = each(self._resize[prefix.past.shape[1], self._room], [prefix.past])
        for start, end, padded in pieces:
            ids, slots = np.zeros((1, padded), np.int32), np.full((1, padded), -1, np.int32)
            ids[0, : end - start], slots[0, : end - start] = prompt.input_ids[start:end], prompt.image_slots[start:end]
            pictures = np.unique(slots[slots >= 0] // self._queries)
            first = pictures[0] if len(pictures) else 0  # those of a piece follow one another
            slots = np.where(slots < 0, slots, slots - first * self._queries).astype(np.int32)
            keys = [reply.request.picture_keys[picture] for picture in pictures]
            features = self.features.stack(keys, self._pictures_in(padded, 2))
            places = np.array([end - start], np.int32), np.array([start], np.int32)
            past, state, fixed, grown = self._extend[padded](
                self._generator.leaves, ids, slots, places[0], features, reply.controls, rotary, in_prompt, places[1],
                np.zeros(1, bool), self._generator.chosen(reply.request.adapter), past=past,
            )  # fmt: skip
        return each(self._resize[self._room, size], [past]), state, fixed, grown

    def _pictures_in(self, length: int, cut: int = 0) -> int:
        """How many pictures so many tokens can have, `cut` of them in part; one at least, which text has nowhere."""
        return max(length // (self._queries + 2) + cut, 1)  # with the tags around it

    def _compile_extension(self, size: int, past: Past, fixed: Fixed) -> None:
        ids, number = jax.ShapeDtypeStruct((1, size), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
        features = self._generator.features(self._pictures_in(size, 2))
        options = controls([SamplingOptions()], [], self._generator.config.vocab_size)
        rotary = frequencies(self._generator.config, [1])
        in_prompt = jax.ShapeDtypeStruct(fixed.in_prompt.shape, bool)
        self._extend.compile(
            size, self._generator.leaves, ids, ids, number, features, options, rotary, in_prompt, number,
            jax.ShapeDtypeStruct((1,), bool), self._generator.chosen(0), past=past,
        )  # fmt: skip


def _pieces(start: int, length: int) -> list[Piece]:
    """What is left of a prompt, cut into pieces of the sizes there are programs for."""
    pieces = []
    while start < length:
        left = length - start
        size = EXTENSIONS[1] if left > 2 * EXTENSIONS[0] else EXTENSIONS[0]
        pieces.append(Piece(start, min(start + size, length), size))
        start += size
    return pieces
