"""Attention against its formula in float64, and the masks against their definitions, token by token."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.nn import row_attention
from qwenvl_jax.nn.attention import (
    attend,
    attend_packed,
    attend_parts,
    causal_mask,
    packed_blocks,
    packed_mask,
)
from qwenvl_jax.nn.row_attention import PackedRows, attend_rows


def random_qkv(rows, queries, keys, heads=2, head_dim=4, seed=0):
    generator = np.random.default_rng(seed)
    lengths = (queries, keys, keys)
    return [generator.standard_normal((rows, n, heads, head_dim)).astype(np.float32) for n in lengths]


def formula(q, k, v, mask=None):
    """softmax(q k / sqrt(H)) v in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(np.broadcast_to(mask, scores[:, 0].shape)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def test_attend_is_its_formula():
    q, k, v = random_qkv(2, 5, 7)
    mask = np.random.default_rng(1).random((2, 5, 7)) < 0.5
    mask[..., 0] = True
    np.testing.assert_allclose(attend(q, k, v), formula(q, k, v), atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, mask), formula(q, k, v, mask), atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, mask[:1]), formula(q, k, v, mask[:1]), atol=1e-6)


def test_a_query_that_may_look_nowhere_gets_the_average():
    q, k, v = random_qkv(1, 2, 3)
    mask = np.array([[[False] * 3, [True, False, False]]])
    mixed = np.asarray(attend(q, k, v, mask))
    np.testing.assert_allclose(mixed[:, 0], v.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(mixed[:, 1], v[:, 0], atol=1e-6)
    gradient = jax.grad(lambda q: attend(q, k, v, mask).sum())(q)
    assert np.isfinite(gradient).all()


def test_bfloat16_rounds_the_weights_only_after_the_softmax():
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(1, 4, 64))
    mixed = attend(q, k, v)
    assert mixed.dtype == jnp.bfloat16
    # Weights and result are rounded to 8 bits each; scores rounded to 8 bits would be three times as far off.
    np.testing.assert_allclose(mixed.astype(np.float32), formula(*map(np.asarray, (q, k, v))), atol=4e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_change_nothing(monkeypatch, masked):
    """A prompt longer than LONGEST_DENSE, which the block length does not divide: values and gradients."""
    q, k, v = random_qkv(2, 13, 13)
    mask = np.tril(np.ones((1, 13, 13), bool)) if masked else None

    def outcome(*qkv):
        return jax.vjp(lambda *x: attend(*x, mask), *qkv)[0], jax.grad(
            lambda x: jnp.sum(jnp.sin(attend(*x, mask))), argnums=0
        )(qkv)

    dense = outcome(q, k, v)
    monkeypatch.setattr("qwenvl_jax.nn.attention.LONGEST_DENSE", 5)
    in_blocks = outcome(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), in_blocks, dense)


@pytest.mark.parametrize("sizes", [[3], [1, 4], [2, 1, 3]])
def test_parts_are_one_array(sizes):
    """Keys and values in several arrays give what they give in one."""
    q, k, v = random_qkv(2, 2, sum(sizes))
    mask = np.random.default_rng(2).random((2, 2, sum(sizes))) < 0.7
    ends = np.cumsum(sizes)[:-1]
    parts = [
        tuple(part.transpose(0, 2, 1, 3) for part in pair)
        for pair in zip(np.split(k, ends, axis=1), np.split(v, ends, axis=1), strict=True)
    ]
    np.testing.assert_allclose(attend_parts(q, parts, mask), attend(q, k, v, mask), atol=1e-6)


def test_causal_mask_hides_the_future_and_padding():
    mask = causal_mask(jnp.array([[True, True, True], [False, True, True]]))
    expected = [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 0], [0, 1, 1]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


PREFIX, WIDTH, BLOCKS, ROWS = 5, 4, 3, 2


@st.composite
def packed_layouts(draw):
    """(group, branch), each int [ROWS, T]: a prefix with one or two documents, then blocks that hold whole branches."""
    group = np.zeros((ROWS, PREFIX + BLOCKS * WIDTH), np.int32)
    branch = np.zeros_like(group)
    for row in range(ROWS):
        first = draw(st.integers(1, PREFIX))
        second = draw(st.integers(0, PREFIX - first))
        group[row, :first] = 1
        group[row, first : first + second] = 2
        documents = [1, 2] if second else [1]
        number = 1
        for block in range(BLOCKS):
            place, end = PREFIX + block * WIDTH, PREFIX + (block + 1) * WIDTH
            for length in draw(st.lists(st.integers(1, WIDTH), max_size=WIDTH)):
                if place + length > end:
                    break
                group[row, place : place + length] = draw(st.sampled_from(documents))
                branch[row, place : place + length] = number
                place, number = place + length, number + 1
    return group, branch


def may_look(group, branch, query, key) -> bool:
    """The definition of `packed_mask` for one query and one key of a row."""
    own_document = group[query] == group[key] and group[key] > 0
    return bool(key <= query and own_document and branch[key] in (0, branch[query]))


@given(packed_layouts())
@settings(max_examples=20, deadline=None)
def test_packed_mask_is_its_definition(layout):
    group, branch = layout
    mask = np.asarray(packed_mask(jnp.asarray(group), jnp.asarray(branch)))
    length = group.shape[1]
    expected = [
        [[may_look(group[b], branch[b], t, s) for s in range(length)] for t in range(length)] for b in range(ROWS)
    ]
    np.testing.assert_array_equal(mask, expected)


@functools.cache
def both_ways():
    """Packed and plain attention with their gradients, compiled once: only the layout changes."""

    def weighted(qkv, mask, real, how):
        mixed = jnp.where(real[:, :, None, None], how(*qkv, mask), 0)  # what padding gets means nothing
        return jnp.sum(jnp.sin(mixed)), mixed

    @jax.jit
    def outcome(qkv, group, branch):
        ways = (attend, packed_mask(group, branch)), (attend_packed, packed_blocks(group, branch, PREFIX, WIDTH))
        return [jax.grad(weighted, has_aux=True)(qkv, mask, group > 0, how) for how, mask in ways]

    return outcome


@given(packed_layouts(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_packed_attention_is_attention_with_the_packed_mask(layout, seed):
    group, branch = layout
    qkv = random_qkv(ROWS, group.shape[1], group.shape[1], seed=seed)
    plain, packed = both_ways()(qkv, group, branch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), packed, plain)


def rows_of(lengths: list[list[int]], tokens: int) -> np.ndarray:
    """group int [B, T] of rows that hold documents of these lengths, and padding."""
    group = np.zeros((len(lengths), tokens), np.int32)
    for row, documents in enumerate(lengths):
        numbers = np.repeat(np.arange(1, len(documents) + 1), documents)
        group[row, : len(numbers)] = numbers
    return group


@pytest.mark.parametrize("branched", [False, True], ids=["whole", "branched"])
@pytest.mark.parametrize("block", [64, 8, 7], ids=["one block", "equal blocks", "a short last block"])
def test_rows_of_documents_are_attention_with_the_packed_mask(monkeypatch, block, branched):
    monkeypatch.setattr(row_attention, "BLOCK_BOUNDS", (block, block))
    group = rows_of([[5, 1, 9, 8], [9, 9], [3]], 24)
    # Of each document two tokens are shared, then come branches of three.
    number = np.arange(24) - np.array([np.searchsorted(np.maximum.accumulate(row), row) for row in group])
    branch = np.where((group > 0) & (number > 1), (number + 1) // 3, 0)
    qkv = random_qkv(3, 24, 24)

    def weighted(qkv, mask, how):
        mixed = jnp.where(group[:, :, None, None] > 0, how(*qkv, mask), 0)  # what padding gets means nothing
        return jnp.sum(jnp.sin(mixed)), mixed

    def outcome(how, mask):
        return jax.jit(jax.grad(functools.partial(weighted, how=how), has_aux=True))(qkv, mask)

    expected = outcome(attend, packed_mask(group, branch if branched else jnp.zeros_like(group)))
    found = outcome(attend_rows, PackedRows(group, 9, branch if branched else None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)
    assert np.isfinite(attend_rows(*qkv, PackedRows(group, longest=9))).all()


def test_rows_of_documents_look_no_further_back_than_the_longest(monkeypatch):
    """No array in the program, forwards and backwards, is as large as the scores of a whole row."""
    monkeypatch.setattr(row_attention, "BLOCK_BOUNDS", (16, 16))
    q, k, v = random_qkv(1, 128, 128, heads=1)
    rows = PackedRows(rows_of([[32, 32, 32, 32]], 128), longest=32)
    program = jax.make_jaxpr(jax.grad(lambda q: attend_rows(q, k, v, rows).sum()))(q)
    sizes = [int(n) * int(m) for n, m in re.findall(r"(?:f32|bool)\[1,(?:1,)?(\d+),(\d+)\]", str(program))]
    assert max(sizes) == 16 * (16 + 32)
