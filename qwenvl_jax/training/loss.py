"""What training minimises: log-probabilities of supervised tokens only, in chunks, and the losses made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    where there is none. Logits are made for `chunk` targets at a time and made again in the backward pass.
    """
    picked = jnp.take_along_axis(hidden, positions[..., None], axis=1).reshape(-1, hidden.shape[-1])
    wanted = targets.reshape(-1)
    count = wanted.shape[0]
    chunk = min(chunk, count)
    padding = -count % chunk
    picked = jnp.pad(picked, ((0, padding), (0, 0))).reshape(-1, chunk, picked.shape[-1])
    wanted = jnp.pad(wanted, (0, padding), constant_values=-100).reshape(-1, chunk)

    def of_chunk(hidden, targets):
        log_p = jax.nn.log_softmax(model.logits(hidden))
        log_p = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(targets >= 0, log_p, 0.0)

    if len(picked) == 1:
        found = of_chunk(picked[0], wanted[0])
    else:
        found = jax.lax.map(lambda x: jax.checkpoint(of_chunk)(*x), (picked, wanted)).reshape(-1)
    return found[:count].reshape(targets.shape)


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
