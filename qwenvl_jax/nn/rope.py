"""Rotary positions (Su et al. 2021), dynamic NTK scaling of their base, and logn attention scaling.

Everything that depends on a prompt's length (the NTK factor) is computed here on the host in numpy and passed to
compiled programs as data, so that no length is ever a reason to compile.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def ntk_alpha(length: int, seq_length: int) -> int:
    """The factor on the rotary base for a prompt of `length` tokens, fixed for the whole generation that follows.

    max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1), that is 1, 3, 7, 15, ... as the prompt passes 1, 2, 4, ...
    times the training length (Qwen-7B's dynamic NTK; computed in integers, where the logarithm could round).
    """
    alpha, reach = 1, seq_length
    while length > reach:
        alpha, reach = 2 * alpha + 1, 2 * reach
    return alpha


def inverse_frequencies(dim: int, base: float, alpha: int = 1) -> np.ndarray:
    """float32 [dim / 2]: 1 / base'^(2j/dim) with base' = base * alpha^(dim / (dim - 2))."""
    scaled_base = base * alpha ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.float32(scaled_base) ** exponents).astype(np.float32)


def rotary_table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, dim/2] each.

    positions int [B, T]; frequencies float32 [B, dim/2], a row per sequence because each keeps its own NTK factor.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first dimensions of each head in float32, dimension j paired with j + dim/2.

    x [B, T, N, H]; cos, sin float32 [B, T, dim/2] with dim <= H. Returns x's dtype.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    wide = x.astype(jnp.float32)
    first, second, rest = jax.lax.split(wide, (half, half, wide.shape[-1] - 2 * half), wide.ndim - 1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def logn_scale(positions: jax.Array, seq_length: int) -> jax.Array:
    """float32 factors on queries at positions p: log(p + 1) / log(seq_length) beyond seq_length, 1 within."""
    count = positions.astype(jnp.float32) + 1.0
    return jnp.where(count > seq_length, jnp.log(count) / math.log(seq_length), 1.0)
