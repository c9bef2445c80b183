"""Features of pictures for an engine: encoded a few at a time, and kept on the device for pictures that come again."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.adapter_bank import with_chosen

AT_ONCE = (4, 1)  # pictures encoded by one call: more would keep the decode steps of others waiting


class PictureFeatures:
    """Features [Q, D] by the digests of their pictures, the least recently used dropped first.

    capacity: pictures kept. Not for several threads.
    """

    def __init__(self, generator: Generator, capacity: int):
        self.queries = self.hits = 0  # pictures asked for, and those that were there
        self._generator = generator
        self._capacity = capacity
        self._kept: OrderedDict[bytes, jax.Array] = OrderedDict()
        self._encode = generator.program(_encode_each, Layout.everywhere)
        self._stack = generator.program(_stacked, Layout.everywhere)
        self._nothing = np.zeros((generator.config.visual.n_queries, generator.config.hidden_size), np.float32)

    def compile(self, pictures: Sequence[int]) -> list[Callable[[], None]]:
        """What compiles all programs, for stacks of these numbers of pictures."""
        generator = self._generator
        shapes = {count: generator.pixels(count) for count in AT_ONCE}
        features = generator.features(1)
        one = jax.ShapeDtypeStruct(features.shape[1:], features.dtype)
        self._nothing = self._nothing.astype(one.dtype)
        return [
            *(partial(self._encode.compile, n, generator.leaves, shapes[n], self._chosen(0)) for n in AT_ONCE),
            *(partial(self._stack.compile, n, generator.leaves, [one] * n) for n in pictures),
        ]

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def encode(self, keys: Sequence[bytes], pixels: np.ndarray, adapter: int) -> None:
        """Encodes pictures, float32 [I, 3, S, S] with I at most AT_ONCE[0], and keeps their features.

        adapter: the number of the one to be used, 0 for none; where it matters, keys must tell them apart.
        """
        count = next(count for count in reversed(AT_ONCE) if count >= len(keys))
        padded = np.zeros((count, *pixels.shape[1:]), np.float32)
        padded[: len(pixels)] = pixels
        features = self._encode[count](self._generator.leaves, padded, self._chosen(adapter))
        self._kept |= dict(zip(keys, features, strict=False))

    def _chosen(self, adapter: int) -> np.ndarray | None:
        return self._generator.chosen(adapter) if self._generator.adapts_pictures else None

    def count(self, pictures: int, encoded: int) -> None:
        """Adds a request's pictures to the counts, of which so many had to be encoded."""
        self.queries += pictures
        self.hits += pictures - encoded

    def stack(self, keys: Sequence[bytes], count: int) -> jax.Array:
        """[count, Q, D]: the features of pictures that are there, and zeros."""
        for key in keys:
            self._kept.move_to_end(key)
        found = [self._kept[key] for key in keys] + [self._nothing] * (count - len(keys))
        return self._stack[count](self._generator.leaves, found)

    def forget(self) -> None:
        """Drops what is more than the capacity, once no prompt needs it that is being read."""
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


def _encode_each(model: QwenVL, pixels: jax.Array, adapter: jax.Array | None) -> tuple[jax.Array, ...]:
    return tuple(with_chosen(model, adapter).encode_images(pixels))


def _stacked(model: QwenVL, features: list[jax.Array]) -> jax.Array:
    return jnp.stack(features)
