"""What training minimises: log-probabilities of supervised tokens only, in chunks, and the losses made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.sharding import along_batch, batch_shards
from qwenvl_jax.training.evaluation import evaluate

Batch = dict[str, jax.Array]


class Objective(NamedTuple):
    """A mean over the units (targets, or pairs of answers) of a step, of which its smaller batches make the sums.

    units: batch -> how many units there are, int, also of several batches [A, ...] together. losses: (model, hidden [B,
    T, D], batch) -> the sum of the units' losses, float32, and sums that are logged as means over them, by name.
    examine: the same arguments -> what `evaluate` sums up over (that of all validation batches) into numbers by name.
    """

    units: Callable[[Batch], jax.Array]
    losses: Callable[[Any, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    examine: Callable[[Any, jax.Array, Batch], Any]
    evaluate: Callable[[Callable, list[tuple[dict, dict]]], dict[str, float]]


def target_log_probs(model, hidden: jax.Array, positions: jax.Array, targets: jax.Array, *, chunk: int = 4096):
    """The log-probability of every target, float32 [B, K], 0 where there is none; logits of all never exist at once.

    hidden [B, T, D]; positions int [B, K]: the token whose hidden state predicts each target; targets int [B, K], -100
    where there is none. Logits are made for `chunk` targets at a time, of all rows alike, and made again in the
    backward pass; on a mesh each device makes so many.
    """
    rows, most = targets.shape
    width = min(most, max(1, chunk * batch_shards() // rows))
    padding = -most % width

    def parts(x, fill):
        """[B, K, ...] -> [chunks, B, width, ...]."""
        padded = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(padded.reshape(rows, -1, width, *x.shape[2:]), 1, 0)

    def of_chunk(hidden, targets):
        logits = along_batch(model.logits(along_batch(hidden)))
        # Not a gather of a log-softmax: its gradient is a scatter into zeros of the logits' size.
        own = jnp.arange(logits.shape[-1]) == targets[..., None]
        log_p = jnp.sum(jnp.where(own, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(targets >= 0, log_p, 0.0)

    picked = parts(jnp.take_along_axis(hidden, positions[..., None], axis=1), 0), parts(targets, -100)
    if len(picked[0]) == 1:
        return of_chunk(*(x[0] for x in picked))
    found = jax.lax.map(lambda x: jax.checkpoint(of_chunk)(*x), picked)  # [chunks, B, width]
    return jnp.moveaxis(found, 0, 1).reshape(rows, -1)[:, :most]


def next_token_loss(model, hidden: jax.Array, positions: jax.Array, targets: jax.Array, *, chunk: int = 4096):
    """Sum of the negative log-likelihoods of the targets, and how many there are, both float32 scalars.

    Equal to cross-entropy over all positions with the others ignored; arguments as of `target_log_probs`.
    """
    total = -jnp.sum(target_log_probs(model, hidden, positions, targets, chunk=chunk))
    return total, jnp.sum(targets >= 0).astype(jnp.float32)


def _examine_targets(model, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss sum, target count, and bool [B, K] whether each target is the likeliest token."""
    total, count = next_token_loss(model, hidden, batch["target_positions"], batch["targets"])
    picked = jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1)
    return total, count, jnp.argmax(model.logits(picked), axis=-1) == batch["targets"]


NEXT_TOKEN = Objective(
    units=lambda batch: jnp.sum(batch["targets"] >= 0),
    losses=lambda model, hidden, b: (next_token_loss(model, hidden, b["target_positions"], b["targets"])[0], {}),
    examine=_examine_targets,
    evaluate=evaluate,
)
