"""Attention of tokens that continue what was read before: among themselves, and over a cache of keys and values."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.nn.attention import mixed_tokens, token_scores
from qwenvl_jax.nn.int8_tokens import TokenArray
from qwenvl_jax.nn.row_attention import HIDDEN, PackedRows, attend_rows_with_sums

BLOCK = 256  # slots of the past that are compared with all queries at once


class Continued(NamedTuple):
    """Each token sees the first `start` slots of the past, the new tokens before it, and itself."""

    start: jax.Array  # int [1], the same for all rows


def attend_continued(
    q: jax.Array, k: jax.Array, v: jax.Array, past: tuple[TokenArray, TokenArray], start: jax.Array
) -> jax.Array:
    """q, k, v [B, T, N, H] of the new tokens; past: keys and values [B, N, S, H]. Returns [B, T, N, H] in v's dtype.

    Work grows with `start` and not with S: blocks of the past that nobody may look at are left out.
    """
    own, log_sum = attend_rows_with_sums(q, k, v, PackedRows(jnp.ones((1, q.shape[1]), jnp.int32), q.shape[1]))
    part = partial(_over_block, q.transpose(0, 2, 1, 3), past, start[0])
    so_far = own.astype(jnp.float32), log_sum
    slots = past[0].shape[2]
    if slots <= BLOCK:
        mixed, _ = part(0, so_far)
    else:
        mixed, _ = jax.lax.fori_loop(0, (start[0] + BLOCK - 1) // BLOCK, part, so_far)
    return mixed.astype(v.dtype).transpose(0, 2, 1, 3)


def _over_block(q, past, start, number, so_far):
    """What the queries q [B, N, T, H] have mixed, and the logarithm of their sums, with one more block of the past."""
    slots = past[0].shape[2]
    width = min(BLOCK, slots)
    first = jnp.minimum(number * width, slots - width)  # the last block may begin before its place
    k, v = (
        jax.tree.map(lambda tokens: jax.lax.dynamic_slice_in_dim(tokens, first, width, axis=2), side) for side in past
    )
    places = first + jnp.arange(width)
    seen = (places >= number * width) & (places < start)
    scores = jnp.where(seen, token_scores(q, k) * q.shape[-1] ** -0.5, HIDDEN)
    mixed, log_sum = so_far
    largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), log_sum)
    powers, own = jnp.exp(scores - largest), jnp.exp(log_sum - largest)
    total = own + jnp.sum(powers, axis=-1, keepdims=True)
    return (own * mixed + mixed_tokens(powers, v, q)) / total, largest + jnp.log(total)
