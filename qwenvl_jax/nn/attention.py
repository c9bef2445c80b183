"""Masked dot-product attention (Vaswani et al. 2017) and the masks that the models use."""

import jax
import jax.numpy as jnp

from qwenvl_jax.nn.linear import full_precision


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k / sqrt(H)) v with scores and softmax in float32.

    q [B, T, N, H]; k, v [B, S, N, H]; mask bool, broadcastable to [B, T, S], True where a query may look. A query that may
    look nowhere (padding) gets an average of all values, never NaN. Returns [B, T, N, H] in v's dtype.
    """
    precision = full_precision(v.dtype)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision=precision)


def causal_mask(valid: jax.Array) -> jax.Array:
    """valid bool [B, T] (False: padding) -> [B, T, T], each token sees itself and the valid tokens before it."""
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :]


def packed_mask(group: jax.Array, branch: jax.Array) -> jax.Array:
    """Mask of rows that hold several documents, each a shared prefix and branches that continue it.

    group int [B, T]: the document a token belongs to, 0 for padding; branch int [B, T]: 0 for the shared prefix, else which
    continuation. A token sees earlier tokens of its own document that are shared or of its own branch. [B, T, T] bool.
    """
    length = group.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same_group = (group[:, :, None] == group[:, None, :]) & (group[:, None, :] > 0)
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return causal & same_group & same_branch
