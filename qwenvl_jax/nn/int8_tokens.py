"""Keys or values of many tokens in 8 bits, with a scale for each token and head.

What attention makes of them is in `attention.py`; which parts of a cache are stored so is not decided here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.nn.quantised import tied


class Int8Tokens(NamedTuple):
    """codes * scale: symmetric, round to nearest, the largest of a token and head being 127 steps from zero.

    Slots are the third axis of both parts, so what moves tokens moves either part alike.
    """

    codes: jax.Array  # int8 [B, N, S, H]
    scale: jax.Array  # float32 [B, N, S]

    @property
    def shape(self) -> tuple[int, ...]:
        """B, N, S, H."""
        return self.codes.shape

    def widened(self, to: jax.Array) -> jax.Array:
        """The codes in the dtype of `to`, made anew wherever that changes: never for all layers ahead of a loop."""
        return tied(self.codes, to).astype(to.dtype)


TokenArray = jax.Array | Int8Tokens  # [B, N, S, H]


def quantised(tokens: jax.Array) -> Int8Tokens:
    """tokens [B, N, S, H] of any float type."""
    wide = tokens.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) * (1 / 127)
    codes = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
    return Int8Tokens(jnp.clip(codes, -127, 127).astype(jnp.int8), scale)


def stored_like(old: TokenArray, tokens: jax.Array) -> TokenArray:
    """tokens [B, N, T, H] in the form of those that they will lie beside."""
    return quantised(tokens) if isinstance(old, Int8Tokens) else tokens
