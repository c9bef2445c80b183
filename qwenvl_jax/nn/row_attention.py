"""Attention over rows that hold whole documents one after another, at the cost of the documents and not of the row."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.nn.linear import full_precision

# Queries that are compared with their keys at once: an eighth of a row between these bounds. Small blocks compare less
# in vain, and on a CPU their scores stay in its caches.
BLOCK_BOUNDS = 64, 512
HIDDEN = jnp.finfo(jnp.float32).min  # the score of a key that a query may not see


@partial(jax.tree_util.register_dataclass, data_fields=("group", "branch"), meta_fields=("longest",))
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of whole documents one after another: each token sees the earlier ones of its own document, and itself.

    A document with branches is what they share and then the branches, which do not see each other.
    `attention.packed_mask(group, branch)` says the same as an array. `longest` is static: attention looks no further
    back.
    """

    group: jax.Array  # int [B, T]: a document's tokens share a number above 0 and are adjacent; 0 for padding
    longest: int  # tokens; no document of any row has more, its branches included
    branch: jax.Array | None = None  # int [B, T]: 0 for what is shared, else which branch; None: nothing branches


class _Labels(NamedTuple):
    """What decides whether a token sees another, as in `PackedRows`: int [B, T]."""

    group: jax.Array
    branch: jax.Array | None


def attend_rows(q: jax.Array, k: jax.Array, v: jax.Array, rows: PackedRows) -> jax.Array:
    """`attention.attend` with the mask of `packed_mask`, for rows as `PackedRows` says. q, k, v [B, T, N, H].

    A block of queries is compared with itself and the `longest` tokens before it, rounded up to blocks: work grows with
    T x longest, not with T x T, and neither mask nor scores of a whole row ever exist. Padding gets 0.
    """
    mixed = [_attend_block(*block) for block in _blocks(q, k, v, rows)]
    return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)


def attend_rows_with_sums(q: jax.Array, k: jax.Array, v: jax.Array, rows: PackedRows) -> tuple[jax.Array, jax.Array]:
    """`attend_rows` as [B, N, T, H], and float32 [B, N, T, 1]: the logarithm of each query's sum of exponentials."""
    mixed, kept = zip(*(_forward(*block) for block in _blocks(q, k, v, rows)), strict=True)
    return jnp.concatenate(mixed, axis=2), jnp.concatenate([residuals[-1] for residuals in kept], axis=2)


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, rows: PackedRows) -> Iterator[tuple]:
    """The arguments of `_attend_block` for each block of queries."""
    length = q.shape[1]
    least, most = BLOCK_BOUNDS
    width = min(max(least, length // 8), most)
    starts = range(0, length, width)

    def blocks(x, axis):
        # Not slices that overlap: the gradient of those is a sum of as many arrays of x's size, padded with zeros.
        return jax.lax.split(x, [min(width, length - start) for start in starts], axis)

    q, k, v = (blocks(x.transpose(0, 2, 1, 3), 2) for x in (q, k, v))
    group, branch = blocks(rows.group, 1), None if rows.branch is None else blocks(rows.branch, 1)

    def labels_of(part: slice) -> _Labels:
        return _Labels(
            jnp.concatenate(group[part], axis=1), None if branch is None else jnp.concatenate(branch[part], axis=1)
        )

    for i, start in enumerate(starts):
        seen = slice(max(0, start + 1 - rows.longest) // width, i + 1)
        keys, values = (jnp.concatenate(x[seen], axis=2) for x in (k, v))
        yield q[i], keys, values, labels_of(slice(i, i + 1)), labels_of(seen)


@jax.custom_vjp
def _attend_block(q: jax.Array, k: jax.Array, v: jax.Array, labels: _Labels, key_labels: _Labels) -> jax.Array:
    """q [B, N, T, H] over k, v [B, N, S, H], which end with q's own tokens -> [B, N, T, H]."""
    return _forward(q, k, v, labels, key_labels)[0]


def _scores(q, k, labels: _Labels, key_labels: _Labels) -> jax.Array:
    """float32 [B, N, T, S]."""
    queries, keys = q.shape[2], k.shape[2]
    (group, branch), (key_group, key_branch) = labels, key_labels
    causal = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)
    mask = causal & (group[:, :, None] == key_group[:, None, :]) & (key_group[:, None, :] > 0)
    if branch is not None and key_branch is not None:
        mask &= (key_branch[:, None, :] == 0) | (branch[:, :, None] == key_branch[:, None, :])
    scores = _product("bnth,bnsh->bnts", q, k)
    return jnp.where(mask[:, None], scores * q.shape[-1] ** -0.5, HIDDEN)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in b's dtype, accumulated in float32."""
    a = a.astype(b.dtype)
    return jnp.einsum(axes, a, b, precision=full_precision(b.dtype), preferred_element_type=jnp.float32)


def _forward(q, k, v, labels, key_labels):
    """What `_attend_block` returns, and the residuals of its backward pass.

    Exponentials are divided by their sum after the product with the values, where a query has H numbers in place of S.
    """
    scores = _scores(q, k, labels, key_labels)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    powers = jnp.exp(scores - largest)
    # A query that sees nothing is padding: an infinite sum gives it 0 here and no gradient below.
    total = jnp.where(largest > HIDDEN, jnp.sum(powers, axis=-1, keepdims=True), jnp.inf)
    mixed = (_product("bnts,bnsh->bnth", powers, v) / total).astype(v.dtype)
    return mixed, (q, k, v, labels, key_labels, mixed, largest + jnp.log(total))


def _backward(kept, gradient):
    """Dao et al. 2022, algorithm 4 (B.4): weights are made again from the scores and their log-sum-exp.

    Differentiating `_forward` would keep or repeat its maximum and sum as well; this takes a sixth less time on a CPU.
    """
    q, k, v, labels, key_labels, mixed, log_total = kept
    weights = jnp.exp(_scores(q, k, labels, key_labels) - log_total)
    own = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    scores = weights * (_product("bnth,bnsh->bnts", gradient, v) - own) * q.shape[-1] ** -0.5
    q_gradient = _product("bnts,bnsh->bnth", scores, k)
    k_gradient = _product("bnts,bnth->bnsh", scores, q)
    v_gradient = _product("bnts,bnth->bnsh", weights, gradient)
    return q_gradient.astype(q.dtype), k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None, None


_attend_block.defvjp(_forward, _backward)
