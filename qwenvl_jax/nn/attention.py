"""Masked dot-product attention (Vaswani et al. 2017) and the masks that the models use."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.nn.int8_tokens import Int8Tokens, TokenArray
from qwenvl_jax.nn.linear import full_precision

# Queries whose scores against all keys are held at once. A longer prompt is processed in blocks, so that its float32
# scores, which grow with the square of its length, never stand in memory as a whole.
LONGEST_DENSE = 1024


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k / sqrt(H)) v with scores and softmax in float32.

    q [B, T, N, H]; k, v [B, S, N, H]; mask bool, broadcastable to [B, T, S], True where a query may look. A query that
    may look nowhere (padding) gets an average of all values, never NaN. Returns [B, T, N, H] in v's dtype.
    """
    length = q.shape[1]
    if length <= LONGEST_DENSE:
        return _attend(q, k, v, mask)
    count = -(-length // LONGEST_DENSE)
    block = -(-length // count)

    def blocks(x, axis):
        """[..., T, ...] -> [count, ..., block, ...], padded at the end of T."""
        padding = [(0, count * block - length if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, padding).reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # A block's scores are computed again in the backward pass instead of kept for it.
    one = jax.checkpoint(lambda part: _attend(part[0], k, v, part[1]))
    mask_blocks = None if mask is None else blocks(jnp.broadcast_to(mask, (mask.shape[0], length, k.shape[1])), 1)
    mixed = jnp.moveaxis(jax.lax.map(one, (blocks(q, 1), mask_blocks)), 0, 1)
    return mixed.reshape(q.shape[0], count * block, *mixed.shape[3:])[:, :length]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    precision = full_precision(v.dtype)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision=precision, preferred_element_type=jnp.float32)
    weights = _weights(scores, q.shape[-1], mask).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision=precision)


def _weights(scores: jax.Array, head_dim: int, mask: jax.Array | None) -> jax.Array:
    scores = scores * (head_dim**-0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def attend_parts(q: jax.Array, parts: Sequence[tuple[TokenArray, TokenArray]], mask: jax.Array) -> jax.Array:
    """`attend` over keys and values that lie in several arrays, heads before slots as a cache stores them.

    q [B, T, N, H]; parts: k, v [B, N, S_i, H] each; mask bool [B, T, S], S the sum of all S_i. Returns [B, T, N, H].
    """
    q = q.transpose(0, 2, 1, 3)
    weights = _weights(jnp.concatenate([token_scores(q, k) for k, _ in parts], axis=-1), q.shape[-1], mask)
    mixed, end = jnp.zeros(q.shape, q.dtype), 0
    for _, v in parts:
        start, end = end, end + v.shape[2]
        mixed += mixed_tokens(weights[..., start:end], v, q).astype(q.dtype)
    return mixed.transpose(0, 2, 1, 3)


def token_scores(q: jax.Array, k: TokenArray) -> jax.Array:
    """float32 [B, N, T, S] of q [B, N, T, H]. A scale of keys is one of scores, so no key is dequantised."""
    if isinstance(k, Int8Tokens):
        return token_scores(q, k.widened(q)) * k.scale[:, :, None]
    precision = full_precision(q.dtype)
    return jnp.einsum("bnth,bnsh->bnts", q, k, precision=precision, preferred_element_type=jnp.float32)


def mixed_tokens(weights: jax.Array, v: TokenArray, q: jax.Array) -> jax.Array:
    """float32 [B, N, T, H] of weights float32 [B, N, T, S], by a product in q's dtype. A scale of values is one of
    weights."""
    if isinstance(v, Int8Tokens):
        return mixed_tokens(weights * v.scale[:, :, None], v.widened(q), q)
    precision = full_precision(q.dtype)
    narrow = weights.astype(q.dtype)
    return jnp.einsum("bnts,bnsh->bnth", narrow, v, precision=precision, preferred_element_type=jnp.float32)


def causal_mask(valid: jax.Array) -> jax.Array:
    """valid bool [B, T] (False: padding) -> [B, T, T], each token sees itself and the valid tokens before it."""
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :]


def packed_mask(group: jax.Array, branch: jax.Array) -> jax.Array:
    """Mask of rows that hold several documents, each a shared prefix and branches that continue it.

    group int [B, T]: the document a token belongs to, 0 for padding; branch int [B, T]: 0 for the shared prefix, else
    which continuation. A token sees earlier tokens of its own document that are shared or of its own branch. [B, T, T]
    bool.
    """
    length = group.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_group = (group[:, :, None] == group[:, None, :]) & (group[:, None, :] > 0)
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return causal & same_group & same_branch


class PackedBlocks(NamedTuple):
    """Masks of packed rows whose branches never cross a block boundary: a prefix, then blocks of equal length.

    Where `packed_mask` would be mostly False, attention computes only what can be True: the prefix among itself, and
    each block over the prefix and itself.
    """

    prefix: jax.Array  # bool [B, P, P]
    blocks: jax.Array  # bool [B * blocks, W, P + W]


def packed_blocks(group: jax.Array, branch: jax.Array, prefix: int, width: int) -> PackedBlocks:
    """The parts of `packed_mask(group, branch)` that can be True for rows of a `prefix` and blocks of `width` tokens.

    group, branch int [B, T] with T = prefix + a multiple of width; branch 0 only within the prefix.
    """
    length = group.shape[1]

    def folded(x):
        tail = x[:, prefix:].reshape(-1, width)
        head = jnp.repeat(x[:, :prefix], (length - prefix) // width, axis=0)
        return jnp.concatenate([head, tail], axis=1)

    blocks = packed_mask(folded(group), folded(branch))[:, prefix:]
    return PackedBlocks(packed_mask(group[:, :prefix], branch[:, :prefix]), blocks)


def attend_packed(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedBlocks) -> jax.Array:
    """`attend` with the mask of `packed_mask`, for rows laid out as `PackedBlocks` says. q, k, v [B, T, N, H]."""
    prefix = mask.prefix.shape[1]
    width = mask.blocks.shape[1]
    count = (q.shape[1] - prefix) // width

    def tail(x):
        return x[:, prefix:].reshape(-1, width, *x.shape[2:])

    def with_prefix(x):
        return jnp.concatenate([jnp.repeat(x[:, :prefix], count, axis=0), tail(x)], axis=1)

    head = attend(q[:, :prefix], k[:, :prefix], v[:, :prefix], mask.prefix)
    rest = attend(tail(q), with_prefix(k), with_prefix(v), mask.blocks)
    return jnp.concatenate([head, rest.reshape(q.shape[0], -1, *q.shape[2:])], axis=1)
