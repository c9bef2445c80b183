"""Keys and values of prompts that were read before, for prompts that begin alike: system prompts, earlier turns.

A prompt is cut into blocks, and each block has a digest of everything before its end: token ids, the digests of the
pictures in their slots, the rotary frequencies and the adapter. So blocks with one digest have the same keys and
values, and prompts that differ in a picture, are rotated differently, or are for another adapter, share none.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.inference.steps import Past
from qwenvl_jax.processing.template import Prompt

BLOCK = 64  # tokens


class Prefix(NamedTuple):
    """The first `length` tokens of a prompt are in the first slots of `past`, [1, N, T, H] per layer."""

    past: Past
    length: int
    owner: bytes | None = None  # its name in the cache


def block_digests(
    prompt: Prompt, picture_keys: Sequence[bytes], frequencies: np.ndarray, adapter: int, queries: int
) -> list[bytes]:
    """A digest of the prompt up to the end of each full block. queries: slots of a picture."""
    digest = hashlib.sha256(frequencies.tobytes() + adapter.to_bytes(4))
    found = []
    for end in range(BLOCK, len(prompt.input_ids) + 1, BLOCK):
        block = slice(end - BLOCK, end)
        slots = prompt.image_slots[block]
        digest.update(np.ascontiguousarray(prompt.input_ids[block]).tobytes())
        digest.update(np.where(slots < 0, slots, slots % queries).tobytes())
        for picture in np.unique(slots[slots >= 0] // queries):
            digest.update(picture_keys[picture])
        found.append(digest.digest())
    return found


class PrefixCache:
    """Pasts of prompts by their blocks, the least recently used dropped first. Not for several threads.

    capacity: slots of all pasts together.
    """

    def __init__(self, capacity: int):
        self.queries = self.hits = 0  # tokens of prompts, and those that were there
        self._capacity = capacity
        self._used = 0
        self._pasts: OrderedDict[bytes, tuple[Past, list[bytes]]] = OrderedDict()  # by the digest of the last block
        self._owner: dict[bytes, bytes] = {}  # which past has a block: the digest of its last one

    def find(self, digests: Sequence[bytes], length: int) -> Prefix | None:
        """The longest known prefix of a prompt of `length` tokens that leaves at least one of them to be read."""
        for count in range(min(len(digests), (length - 1) // BLOCK), 0, -1):
            owner = self._owner.get(digests[count - 1])
            if owner is not None:
                return Prefix(self._pasts[owner][0], count * BLOCK, owner)
        return None

    def use(self, prefix: Prefix) -> None:
        """Says that one is made use of, just after it was found."""
        if prefix.owner is not None:
            self._pasts.move_to_end(prefix.owner)

    def keep(self, digests: list[bytes], past: Past) -> None:
        """Adds the past of a prompt."""
        slots = past.shape[1]
        if not digests or digests[-1] in self._owner or slots > self._capacity:
            return
        self._pasts[digests[-1]] = past, digests
        self._owner |= dict.fromkeys(digests, digests[-1])
        self._used += slots
        while self._used > self._capacity:
            oldest, (dropped, blocks) = self._pasts.popitem(last=False)
            self._used -= dropped.shape[1]
            for block in blocks:
                if self._owner.get(block) == oldest:
                    del self._owner[block]

    def count(self, tokens: int, found: int) -> None:
        """Adds a prompt to the counts, of which so many tokens were there."""
        self.queries += tokens
        self.hits += found
