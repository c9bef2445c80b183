"""The next-token loss, of supervised tokens only and in chunks: logits of all tokens never exist at once."""

import jax
import jax.numpy as jnp

from qwenvl_jax.sharding import along_batch, batch_shards


def next_token_loss(model, hidden: jax.Array, positions: jax.Array, targets: jax.Array, *, chunk: int = 4096):
    """Sum of the negative log-likelihoods of the targets, and how many there are, both float32 scalars.

    hidden [B, T, D]; positions int [B, K]: the token whose hidden state predicts each target; targets int [B, K], -100
    where there is none. Equal to cross-entropy over all positions with the others ignored. Logits are made for `chunk`
    targets at a time, of all rows alike, and made again in the backward pass; on a mesh each device makes so many.
    """
    rows, most = targets.shape
    width = min(most, max(1, chunk * batch_shards() // rows))
    padding = -most % width

    def parts(x):
        """[B, K, ...] -> [chunks, B, width, ...]."""
        padded = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)), constant_values=-100)
        return jnp.moveaxis(padded.reshape(rows, -1, width, *x.shape[2:]), 1, 0)

    def chunk_loss(hidden, targets):
        log_p = jax.nn.log_softmax(along_batch(model.logits(along_batch(hidden))))
        nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(targets >= 0, nll, 0.0))

    picked = parts(jnp.take_along_axis(hidden, positions[..., None], axis=1)), parts(targets)
    if len(picked[0]) == 1:
        total = chunk_loss(*(x[0] for x in picked))
    else:
        total = jnp.sum(jax.lax.map(lambda x: jax.checkpoint(chunk_loss)(*x), picked))
    return total, jnp.sum(targets >= 0).astype(jnp.float32)
