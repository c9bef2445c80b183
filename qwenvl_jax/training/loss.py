"""The next-token loss, of supervised tokens only and in chunks: logits of all tokens never exist at once."""

import jax
import jax.numpy as jnp


def next_token_loss(model, hidden: jax.Array, positions: jax.Array, targets: jax.Array, *, chunk: int = 4096):
    """Sum of the negative log-likelihoods of the targets, and how many there are, both float32 scalars.

    hidden [B, T, D]; positions int [B, K]: the token whose hidden state predicts each target; targets int [B, K], -100
    where there is none. Equal to cross-entropy over all positions with the others ignored. Logits are made for `chunk`
    targets at a time and made again in the backward pass.
    """
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1).reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1)
    count = targets.shape[0]
    chunk = min(chunk, count)
    padding = -count % chunk
    picked = jnp.pad(picked, ((0, padding), (0, 0))).reshape(-1, chunk, picked.shape[-1])
    targets = jnp.pad(targets, (0, padding), constant_values=-100).reshape(-1, chunk)

    def chunk_loss(hidden, targets):
        log_p = jax.nn.log_softmax(model.logits(hidden))
        nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(targets >= 0, nll, 0.0))

    if len(picked) == 1:
        total = chunk_loss(picked[0], targets[0])
    else:
        total = jnp.sum(jax.lax.map(lambda x: jax.checkpoint(chunk_loss)(*x), (picked, targets)))
    return total, jnp.sum(targets >= 0).astype(jnp.float32)
