"""Direct preference optimisation (Rafailov et al. 2023, equation 7): its recipe, its loss and what is told of it.

The records are in `data/pairs.py`; what the start weights say of them, which the loss compares with, in `reference.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwenvl_jax.config import UserError
from qwenvl_jax.training.loss import Objective, target_log_probs


@dataclasses.dataclass(frozen=True)
class DpoRecipe:
    """How preferences are learnt."""

    beta: float = 0.1  # how strongly the model is held to the one that it starts from
    label_smoothing: float = 0.0  # share of the pairs that are taken to be the wrong way round (conservative DPO)
    sft_weight: float = 0.0  # of the chosen answer's loss per token, added to that of the pair (RPO's alpha)

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"dpo.beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo.label_smoothing is {self.label_smoothing}; it must lie in 0..0.5, below 0.5")
        if self.sft_weight < 0:
            raise UserError(f"dpo.sft_weight is {self.sft_weight}; it must be 0 or more")


def answer_log_probs(model, hidden: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each answer, summed over its tokens, and their number, both float32 [B, M, 2].

    hidden [B, T, D]; batch: of pairs, see `RecordBatches`; M records in a row, the chosen answer first. 0 where a row
    has fewer.
    """
    log_p = target_log_probs(model, hidden, batch["target_positions"], batch["targets"])
    answers = 2 * batch["record"].shape[1]
    own = (batch["target_answer"][..., None] == jnp.arange(answers)) & (batch["targets"][..., None] >= 0)
    summed = jnp.sum(jnp.where(own, log_p[..., None], 0), axis=1)
    shape = *batch["record"].shape, 2
    return summed.reshape(shape), jnp.sum(own, axis=1).reshape(shape).astype(jnp.float32)


def preference_losses(recipe: DpoRecipe, model, hidden: jax.Array, batch: dict[str, jax.Array]):
    """The sum of the losses of a batch's pairs, and the sums of what is logged, float32 scalars, by name.

    Arguments as of `answer_log_probs`; the batch also has reference float32 [B, M, 2], the log-probabilities of the
    same answers under the model that the run started from. rewards/... are beta (log p - log p_reference).
    """
    log_p, lengths = answer_log_probs(model, hidden, batch)
    rewards = recipe.beta * (log_p - batch["reference"])
    margin = rewards[..., 0] - rewards[..., 1]
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    loss = -(1 - recipe.label_smoothing) * right - recipe.label_smoothing * wrong
    loss -= recipe.sft_weight * log_p[..., 0] / jnp.maximum(lengths[..., 0], 1)
    values = {
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/accuracies": margin > 0,
        "rewards/margins": margin,
        "logps/chosen": log_p[..., 0],
        "logps/rejected": log_p[..., 1],
    }
    real = batch["record"] >= 0
    sums = {name: jnp.sum(jnp.where(real, value, 0), dtype=jnp.float32) for name, value in values.items()}
    return jnp.sum(jnp.where(real, loss, 0)), sums


def preference_objective(recipe: DpoRecipe) -> Objective:
    """The mean of the losses of pairs; every pair counts alike, however long its answers are."""

    def units(batch):
        return jnp.sum(batch["record"] >= 0)

    def losses(model, hidden, batch):
        return preference_losses(recipe, model, hidden, batch)

    def examine(model, hidden, batch):
        total, sums = losses(model, hidden, batch)
        return {"loss": total} | sums, units(batch)

    return Objective(units, losses, examine, _evaluate)


def _evaluate(step: Callable, batches: list[tuple[dict, dict]]) -> dict[str, float]:
    """The means over all pairs of `batches` of the loss and what else is logged, by name."""
    examined = [step(placed) for _, placed in batches]
    pairs = sum(float(count) for _, count in examined)
    means = {name: sum(float(sums[name]) for sums, _ in examined) / pairs for name in examined[0][0]}
    return means | {"right/pairs": means["rewards/accuracies"]}  # shown and drawn as shares of answers right are
