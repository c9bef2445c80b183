"""The KV cache of decoding: each layer's keys and values of the tokens so far.

It has two parts. The past is only read by decode steps, so a compiled loop over steps never copies it; the few most
recent tokens are written, at every step into the same slots of every sequence, however long each of them is; which of
these a sequence has a token in is told beside them. When the recent part is full, `flush` moves it into the past. Slots
are only places: positions belong to the rotary tables.
The past may be in 8 bits: what comes to it is quantised then, and the recent part stays as the model made it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.nn.attention import attend_parts
from qwenvl_jax.nn.int8_tokens import TokenArray, stored_like


class LayerCache(NamedTuple):
    """One layer's keys (rotated) and values, heads before slots: [B, N, S, H] past, [B, N, R, H] recent."""

    past_k: TokenArray
    past_v: TokenArray
    recent_k: jax.Array
    recent_v: jax.Array

    def append(self, k: jax.Array, v: jax.Array, slot: jax.Array) -> "LayerCache":
        """Stores k, v [B, T, N, H] in the recent slots from `slot` (int []) on, which must have room for them."""

        def written(recent, new):
            return jax.lax.dynamic_update_slice_in_dim(
                recent, new.transpose(0, 2, 1, 3).astype(recent.dtype), slot, axis=2
            )

        return self._replace(recent_k=written(self.recent_k, k), recent_v=written(self.recent_v, v))

    def attend(self, q: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention of q [B, T, N, H] over past and recent slots; mask bool [B, T, S + R]. Returns [B, T, N, H]."""
        return attend_parts(q, [(self.past_k, self.past_v), (self.recent_k, self.recent_v)], mask)


def start(k: jax.Array, v: jax.Array, recent: int) -> LayerCache:
    """The cache after a prompt whose keys and values are k, v [B, T, N, H], with room for `recent` tokens."""
    return with_recent(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), recent, k.dtype)


def with_recent(k: TokenArray, v: TokenArray, recent: int, dtype) -> LayerCache:
    """A cache of past keys and values [B, N, S, H], with room for `recent` tokens of the model's dtype."""
    batch, heads, _, head_dim = k.shape
    empty = jnp.zeros((batch, heads, recent, head_dim), dtype)
    return LayerCache(k, v, empty, empty)


def cached_mask(past: jax.Array, slots: int, taken: jax.Array, at: jax.Array, tokens: int) -> jax.Array:
    """bool [B, T, S + R], where T new tokens may look, which lie in the recent slots from `at` (int []) on.

    The first `past` (int [B]) slots, the recent ones that are `taken` (bool [B, R]), the new tokens before them, and
    themselves.
    """
    old = jnp.arange(slots) < past[:, None]
    places, own = jnp.arange(taken.shape[1]), at + jnp.arange(tokens)[:, None]
    new = taken[:, None] | ((places >= at) & (places <= own))
    return jnp.concatenate([jnp.broadcast_to(old[:, None], (*new.shape[:2], slots)), new], axis=2)


def flush(cache: LayerCache, past: jax.Array, taken: jax.Array, slots: int) -> LayerCache:
    """Both pasts as `flushed` makes them."""
    past_k = flushed(cache.past_k, cache.recent_k, past, taken, slots)
    return cache._replace(past_k=past_k, past_v=flushed(cache.past_v, cache.recent_v, past, taken, slots))


def flushed(old: TokenArray, recent: jax.Array, past: jax.Array, taken: jax.Array, slots: int) -> TokenArray:
    """The recent tokens [B, N, R, H] in slots that are `taken` (bool [B, R]) behind the first `past` (int [B]) slots.

    old [B, N, S, H]; the result has `slots` slots, S or more. What would fall behind its end is dropped.
    """
    rows = jnp.arange(past.shape[0])[:, None]
    targets = jnp.where(taken, past[:, None] + jnp.cumsum(taken, axis=1) - 1, slots)  # [B, R]

    def moved(old, new):
        # Indexed dimensions come first: [B, R, N, H].
        return old.at[rows, :, targets].set(jnp.swapaxes(new, 1, 2), mode="drop")

    return jax.tree.map(moved, resized(old, slots), stored_like(old, recent))


def resized(tokens: TokenArray, slots: int) -> TokenArray:
    """[B, N, S, H] with another number of slots: empty ones at the end, or the first ones alone."""

    def one(part: jax.Array) -> jax.Array:
        more = slots - part.shape[2]
        padding = [(0, more if axis == 2 else 0) for axis in range(part.ndim)]
        return jnp.pad(part, padding) if more > 0 else part[:, :, :slots]

    return jax.tree.map(one, tokens)
