"""Attention of tokens after a past, against attention over all of them in one array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.nn import continued_attention, row_attention
from qwenvl_jax.nn.attention import attend_parts
from qwenvl_jax.nn.continued_attention import attend_continued
from qwenvl_jax.nn.int8_tokens import quantised

SLOTS, TOKENS = 22, 12


def tokens(seed: int, slots: int) -> jax.Array:
    """[B, N, slots, H]"""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, slots, 8)), jnp.float32)


@functools.cache
def continued(block: int, rows: int):
    def attention(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(continued_attention, "BLOCK", block)
            patch.setattr(row_attention, "BLOCK_BOUNDS", (rows, rows))
            return attend_continued(*arguments)

    return jax.jit(attention)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize(("block", "rows"), [(32, 64), (8, 5)], ids=["whole", "blocks that do not divide"])
@pytest.mark.parametrize("start", [0, 1, 8, 17, SLOTS])
def test_it_is_attention_over_past_and_new_tokens(start, block, rows, int8):
    q, k, v = (tokens(seed, TOKENS) for seed in range(3))
    past = tuple((quantised if int8 else jnp.asarray)(tokens(seed, SLOTS)) for seed in (3, 4))
    old = jnp.broadcast_to(jnp.arange(SLOTS) < start, (TOKENS, SLOTS))
    mask = jnp.concatenate([old, jnp.tril(jnp.ones((TOKENS, TOKENS), bool))], axis=1)[None]
    turned = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    expected = attend_parts(turned[0], [past, (k, v)], mask)
    found = continued(block, rows)(*turned, past, jnp.array([start]))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_slots_behind_the_start_are_left_out():
    """Not only hidden: what is there may be no numbers, but for the block that the start is in."""
    q, k, v = (tokens(seed, TOKENS).transpose(0, 2, 1, 3) for seed in range(3))
    past = tuple(tokens(seed, SLOTS).at[:, :, 16:].set(jnp.nan) for seed in (3, 4))
    assert np.isfinite(continued(8, 64)(q, k, v, past, jnp.array([16]))).all()


def test_it_keeps_the_dtype_of_the_values():
    q, k, v = (tokens(seed, 4).transpose(0, 2, 1, 3).astype(jnp.bfloat16) for seed in range(3))
    past = tuple(tokens(seed, 4).astype(jnp.bfloat16) for seed in (3, 4))
    assert attend_continued(q, k, v, past, jnp.array([2])).dtype == jnp.bfloat16
