"""The cache of decoding: whatever moves inside, attention over it is attention over all tokens so far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.nn import cache as kv_cache

ROWS, HEADS, HEAD_DIM, RECENT = 3, 2, 4, 3
ALL = np.ones((ROWS, RECENT), bool)  # every row has a token in every recent slot
LENGTHS = np.array([5, 2, 4])  # of the prompts, padded on the right to the longest


def random(generator, length):
    return generator.standard_normal((ROWS, length, HEADS, HEAD_DIM)).astype(np.float32)


def attend_alone(q, k, v):
    """Attention of one row's query [1, N, H] over exactly its own keys and values [S, N, H]."""
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores)
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("grow", [0, 6], ids=["same_size", "growing"])
def test_steps_over_the_cache_are_attention_over_everything(grow):
    """Eight tokens for prompts of different lengths, with a flush after every three."""
    generator = np.random.default_rng(0)
    prompt_k, prompt_v = random(generator, 5), random(generator, 5)
    slots = 5 if grow else 16
    padding = ((0, 0), (0, slots - 5), (0, 0), (0, 0))
    cache = kv_cache.start(jnp.pad(prompt_k, padding), jnp.pad(prompt_v, padding), RECENT)
    past = jnp.asarray(LENGTHS)
    keys = [prompt_k[row, :length] for row, length in enumerate(LENGTHS)]
    values = [prompt_v[row, :length] for row, length in enumerate(LENGTHS)]

    step = jax.jit(
        lambda cache, q, k, v, past, at: (
            (filled := cache.append(k, v, at)),
            filled.attend(q, kv_cache.cached_mask(past, cache.past_k.shape[2], ALL & (jnp.arange(RECENT) < at), at, 1)),
        )
    )
    for count in range(8):
        at = count % RECENT
        if count and at == 0:
            slots += grow
            cache = kv_cache.flush(cache, past, ALL, slots)
            past = past + RECENT
        q, k, v = (random(generator, 1) for _ in range(3))
        cache, mixed = step(cache, q, k, v, past, jnp.int32(at))
        for row in range(ROWS):
            keys[row] = np.concatenate([keys[row], k[row]])
            values[row] = np.concatenate([values[row], v[row]])
            expected = attend_alone(q[row], keys[row], values[row])
            np.testing.assert_allclose(mixed[row], expected, atol=1e-6, err_msg=f"token {count}, row {row}")


def test_append_writes_its_slot_alone():
    generator = np.random.default_rng(1)
    cache = kv_cache.start(random(generator, 2), random(generator, 2), RECENT)
    k, v = random(generator, 1), random(generator, 1)
    written = cache.append(k, v, jnp.int32(1))
    np.testing.assert_array_equal(written.past_k, cache.past_k)
    np.testing.assert_array_equal(written.recent_k[:, :, 1], k[:, 0])
    np.testing.assert_array_equal(written.recent_v[:, :, 1], v[:, 0])
    np.testing.assert_array_equal(written.recent_v[:, :, [0, 2]], 0)


def test_flush_moves_each_row_behind_its_own_tokens():
    generator = np.random.default_rng(2)
    prompt = random(generator, 6)
    new = random(generator, RECENT)
    cache = kv_cache.start(prompt, prompt, RECENT).append(new, new, jnp.int32(0))
    taken = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool)
    flushed = kv_cache.flush(cache, jnp.array([3, 0, 6]), taken, 8)
    moved = np.asarray(flushed.past_k).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(moved[0, :6], np.concatenate([prompt[0, :3], new[0]]))
    np.testing.assert_array_equal(moved[1, :2], new[1, [0, 2]])
    np.testing.assert_array_equal(moved[2], np.concatenate([prompt[2], new[2, :2]]))  # the third finds no room
    np.testing.assert_array_equal(flushed.past_v, flushed.past_k)


def test_cached_mask():
    taken = np.array([[1, 0, 0, 0], [0, 0, 0, 0]], bool)
    mask = kv_cache.cached_mask(jnp.array([2, 0]), 3, taken, jnp.int32(2), tokens=2)
    expected = [
        [[1, 1, 0, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1, 1]],
        [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1]],
    ]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_the_cache_keeps_the_dtype_of_the_prompt():
    generator = np.random.default_rng(3)
    prompt = jnp.asarray(random(generator, 2), jnp.bfloat16)
    cache = kv_cache.start(prompt, prompt, RECENT).append(random(generator, 1), random(generator, 1), jnp.int32(0))
    assert {leaf.dtype for leaf in cache} == {jnp.dtype(jnp.bfloat16)}
