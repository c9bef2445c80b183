"""Keys and values in 8 bits: how far off they are, what attention makes of them, and that they stay in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.attention import attend_parts
from qwenvl_jax.nn.int8_tokens import Int8Tokens, quantised

HEADS, HEAD_DIM = 2, 16


def random(seed: int, rows: int, slots: int, spread: float = 1) -> np.ndarray:
    """[B, N, S, H], tokens of very different sizes."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(spread * generator.normal(size=(rows, HEADS, slots, 1)))
    return (sizes * generator.normal(size=(rows, HEADS, slots, HEAD_DIM))).astype(np.float32)


def dequantised(tokens: Int8Tokens) -> np.ndarray:
    return np.asarray(tokens.codes) * np.asarray(tokens.scale)[..., None]


quantise, attention = jax.jit(quantised), jax.jit(attend_parts)


def test_no_number_is_off_by_more_than_half_a_step():
    """A step is a 127th of the largest number of the token and head, whatever others are like."""
    tokens = random(0, 2, 5)
    tokens[0, 0, 3] = 0
    stored = quantise(tokens)
    largest = np.max(np.abs(tokens), axis=-1, keepdims=True)
    assert np.all(np.abs(dequantised(stored) - tokens) <= largest / 254 * (1 + 1e-5))
    np.testing.assert_array_equal(np.max(np.abs(stored.codes), axis=-1), np.where(largest[..., 0] > 0, 127, 0))
    assert (stored.codes.dtype, stored.scale.dtype, stored.shape) == (jnp.int8, jnp.float32, tokens.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_that_over_the_dequantised_parts(dtype):
    q = random(1, 2, 3).transpose(0, 2, 1, 3).astype(dtype)
    k, v, recent = (random(seed, 2, 7).astype(dtype) for seed in (2, 3, 4))
    mask = np.random.default_rng(5).random((2, 3, 14)) < 0.7
    stored = quantise(k), quantise(v)
    wide = tuple(dequantised(tokens).astype(dtype) for tokens in stored)
    mixed = attention(q, [stored, (recent, recent)], mask)
    expected = attention(q, [wide, (recent, recent)], mask).astype(jnp.float32)
    assert mixed.dtype == dtype
    # Above float32's error is what rounding weights and parts to bfloat16 gives either side, 8 bits each.
    np.testing.assert_allclose(mixed.astype(jnp.float32), expected, atol=5e-6 if dtype == jnp.float32 else 6e-2)


def test_attention_is_off_by_no_more_than_the_steps_explain():
    """With steps a and b of keys and values, a number of a key is off by a / 2, so a score by e = |q|_1 a / 2 sqrt(H).

    The ratio of new and old weights lies in exp(-2e) to exp(2e), so weights change by exp(2e) - 1 in all, times the
    largest value; values themselves add b / 2.
    """
    q = random(6, 2, 3, spread=0).transpose(0, 2, 1, 3)
    k, v = random(7, 2, 40, spread=0), random(8, 2, 40, spread=0)
    stored = quantise(k), quantise(v)
    steps = [np.max(tokens.scale, axis=2)[:, None] for tokens in stored]  # [B, 1, N]
    error = np.sum(np.abs(q), axis=-1) * steps[0] / 2 / np.sqrt(HEAD_DIM)
    bound = np.expm1(2 * error) * np.max(np.abs(v), axis=(2, 3))[:, None] + steps[1] / 2
    mask = np.ones((2, 3, 40), bool)
    off = np.abs(attention(q, [stored], mask) - attention(q, [(k, v)], mask)).max(-1)
    assert np.all(off <= bound)
    assert np.all(off > bound / 200)  # of either sign, most of the errors cancel; yet it is no empty bound
    assert np.max(off) < np.max(steps[1]) / 2  # in fact


@pytest.mark.parametrize("slots", [8, 12])
def test_moving_tokens_is_quantising_what_was_moved(slots):
    """What comes to the past is quantised, and what was there stays as it is, bit by bit."""
    old, recent = random(9, 3, 8), random(10, 3, 4)
    past, taken = jnp.array([3, 0, 8]), jnp.array([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]], bool)
    flushed = jax.jit(kv_cache.flushed, static_argnums=4)
    moved = flushed(quantise(old), recent, past, taken, slots)
    expected = quantise(flushed(old, recent, past, taken, slots))
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_a_cut_past_is_the_first_slots():
    old = random(11, 3, 8)
    fewer = jax.jit(kv_cache.resized, static_argnums=1)(quantise(old), 5)
    jax.tree.map(np.testing.assert_array_equal, fewer, quantise(old[:, :, :5]))


def test_nothing_is_dequantised_ahead_of_a_loop():
    """The past does not change in a loop over tokens, and a compiler would like to widen all layers before it."""
    layers, slots = 6, 256
    past = [(quantised(random(i, 1, slots)), quantised(random(i + 20, 1, slots))) for i in range(layers)]

    def decode(q, past):
        def step(_, q):
            for part in past:
                q = q + attend_parts(q, [part], jnp.ones((1, 1, slots), bool))
            return q

        return jax.lax.fori_loop(0, 5, step, q)

    compiled = jax.jit(decode).lower(random(30, 1, 1).transpose(0, 2, 1, 3), past).compile()
    layer = 2 * 4 * HEADS * slots * HEAD_DIM  # bytes of its keys and values in float32
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * layer
