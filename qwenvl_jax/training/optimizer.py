"""Optimizers and schedules, from optax, over parameters named by their path."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from qwenvl_jax.config import UserError
from qwenvl_jax.training.parts import Parts


@dataclasses.dataclass(frozen=True)
class OptimizerRecipe:
    """How parameters move.

    `adamw` treats all alike (Loshchilov and Hutter 2019). `adafactor` keeps row and column means in place of Adam's
    second moments, and no first ones (Shazeer and Stern 2018). `muon` orthogonalises the update of every matrix (Jordan
    et al. 2024) and treats vectors, embeddings and the output head with Adam at `adam_learning_rate`.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-5
    adam_learning_rate: float | None = None  # muon only; None: learning_rate
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 0
    warmup_share: float | None = None  # of all steps, in place of warmup_steps
    decay_share: float = 0.2  # wsd (warm-up, stable, decay): the last share of the steps, in which the rate falls
    final_share: float = 0.0  # learning rate at the end over its peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # of the global gradient

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("final_share", "decay_share", "warmup_share"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must lie in 0..1")
        if self.warmup_share is not None and self.warmup_steps:
            raise UserError("optimizer: warmup_steps and warmup_share say the same; give one of them")


def schedule(recipe: OptimizerRecipe, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then the recipe's decay until `steps`."""
    warm = recipe.warmup_steps if recipe.warmup_share is None else math.ceil(recipe.warmup_share * steps)
    rest, end = max(steps - warm, 1), peak * recipe.final_share
    falling = max(round(steps * recipe.decay_share), 1)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, recipe.final_share),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(peak, end, falling, transition_begin=max(rest - falling, 0)),
    }[recipe.schedule]()
    if not warm:
        return decay
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, warm), decay], [warm])


def matrix_axes(path: str, value: jax.Array) -> MuonDimensionNumbers | None:
    """Which axes of a parameter form the matrices that Muon orthogonalises; None for Adam.

    Layers in a stack and the three thirds of a fused projection are matrices of their own. Layers in a list
    ("layers.3.") have no axis for them.
    """
    if not path.endswith("kernel") or "lm_head" in path or path.startswith("auxiliary"):
        return None
    first = 1 if re.search(r"\b(layers|blocks)\.(?!\d)", path) else 0
    if path.endswith("qkv.kernel"):
        output = (first + 1, first + 3) if "blocks." in path else (first + 2,)
        return MuonDimensionNumbers((first,), output)
    return MuonDimensionNumbers((first,), (first + 1,))


def decays(path: str) -> bool:
    """Weight decay is for matrices, adapters' too; norms, biases, queries and position tables keep their scale."""
    return path.endswith(("kernel", "table", ".a", ".b"))


def make_optimizer(
    recipe: OptimizerRecipe,
    params: dict[str, jax.Array],
    steps: int,
    parts: Parts | None = None,
    ratios: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates over the trained `params`, arrays by path.

    `parts` may give some of them a learning rate of their own, `ratios` a factor: the schedule is scaled for them, and
    weight decay with it.
    """
    rate = schedule(recipe, recipe.learning_rate, steps)
    mask = {path: decays(path) for path in params}
    if recipe.name == "adamw":
        core = optax.adamw(
            rate, recipe.beta1, recipe.beta2, recipe.epsilon, weight_decay=recipe.weight_decay, mask=mask
        )
    elif recipe.name == "adafactor":
        core = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(recipe.weight_decay, mask),
            optax.scale_by_learning_rate(rate),
        )
    else:
        axes = {path: matrix_axes(path, value) for path, value in params.items()}
        core = muon(
            rate,
            weight_decay=recipe.weight_decay,
            adam_weight_decay=0.0,
            adam_b1=recipe.beta1,
            adam_b2=recipe.beta2,
            adam_learning_rate=schedule(recipe, recipe.adam_learning_rate or recipe.learning_rate, steps),
            muon_weight_dimension_numbers=axes,
        )
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm), core, *_own_rates(recipe, params, parts, ratios or {})
    )


def _own_rates(
    recipe: OptimizerRecipe, params, parts: Parts | None, ratios: Mapping[str, float]
) -> list[optax.GradientTransformation]:
    """What scales the updates of parameters with a rate of their own; nothing where there are none."""
    depth = 1 + max((layer for path, value in params.items() for layer in vit_layers(path, value)), default=0)

    def scale(path: str, value: jax.Array) -> float | np.ndarray:
        by_adam = recipe.name == "muon" and matrix_axes(path, value) is None
        usual = (recipe.adam_learning_rate if by_adam else None) or recipe.learning_rate
        own = parts.of(path).learning_rate if parts else None
        factor = (own or usual) / usual * ratios.get(path, 1.0)
        layers = vit_layers(path, value)
        if parts is None or parts.vision.layer_decay == 1 or not len(layers):
            return factor
        below_top = depth - layers
        each = factor * parts.vision.layer_decay**below_top
        return each.reshape(-1, *(1,) * (value.ndim - 1)).astype(np.float32) if len(each) > 1 else float(each[0])

    scales = {path: scale(path, value) for path, value in params.items()}
    if all(isinstance(value, float) and value == 1.0 for value in scales.values()):
        return []
    return [optax.stateless(lambda updates, _: {path: u * scales[path] for path, u in updates.items()})]


def vit_layers(path: str, value: jax.Array) -> np.ndarray:
    """The places in the vision transformer of a parameter, or of each layer of a stack: 0 embeds, blocks follow.

    Empty for parameters of anything else.
    """
    inside = re.match(r"model\.visual\.vit\.(?:blocks\.(\d+)?)?", path)
    if inside is None:
        return np.arange(0)
    if ".blocks." not in path:
        return np.arange(1)
    return np.arange(1, 1 + value.shape[0]) if inside[1] is None else np.array([1 + int(inside[1])])
