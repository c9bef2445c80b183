"""The KV cache: keys and values of the tokens so far, one pair of arrays per layer, filled in place when donated."""

import jax
import jax.numpy as jnp

# One layer's keys and values, each [B, S, N, H]. Keys are stored rotated.
LayerCache = tuple[jax.Array, jax.Array]


def empty(layers: int, batch: int, length: int, heads: int, head_dim: int, dtype) -> list[LayerCache]:
    """A cache of zeros with room for `length` tokens per sequence."""
    shape = (batch, length, heads, head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]


def write(cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array) -> LayerCache:
    """Stores k, v [B, T, N, H] at slots start .. start + T - 1 of each sequence; start int [B]."""

    def one(buffer, new, at):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), at, axis=0)

    return jax.vmap(one)(cache[0], k, start), jax.vmap(one)(cache[1], v, start)
