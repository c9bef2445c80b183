"""One training step as pure functions over named parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwenvl_jax.models.qwen_vl import Remat, frequencies
from qwenvl_jax.nn.attention import packed_blocks
from qwenvl_jax.nn.lora import with_dropout
from qwenvl_jax.training.auxiliary import cell_loss
from qwenvl_jax.training.loss import NEXT_TOKEN, Objective

Parameters = dict[str, jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "optimizer"), meta_fields=())
@dataclasses.dataclass
class TrainState:
    """What a step changes: the number of steps done, the trained parameters by path, the optimizer's memory."""

    step: jax.Array
    params: Parameters
    optimizer: Any


def named_parameters(module) -> tuple[Parameters, Callable[[Parameters], Any]]:
    """Arrays of a module (or dict of modules) by dotted path, and the function that puts them back into it."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    paths = [dotted(path) for path, _ in leaves]

    def rebuild(params: Parameters):
        return jax.tree.unflatten(structure, [params[path] for path in paths])

    return dict(zip(paths, [value for _, value in leaves], strict=True)), rebuild


def dotted(path) -> str:
    """A jax key path as "model.layers.qkv.kernel"."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")


def packed_hidden(model, batch: dict[str, jax.Array], *, remat: Remat = "none") -> tuple[jax.Array, jax.Array]:
    """Last hidden states [B, T, D] and picture features [I, Q, D] of a packed batch, in training mode.

    Batch (see `data.packing`): ids, slots, positions, group int [B, T]; branch int [B, blocks, block]; pixels float32
    [I, 3, S, S].
    """
    features = model.encode_images(batch["pixels"])
    rows, blocks, width = batch["branch"].shape
    prefix = batch["ids"].shape[1] - blocks * width
    branch = jnp.pad(batch["branch"].reshape(rows, -1), ((0, 0), (prefix, 0)))
    context = model.context(
        packed_blocks(batch["group"], branch, prefix, width),
        batch["positions"],
        jnp.asarray(frequencies(model.config, [0])).repeat(rows, axis=0),
        training=True,
    )
    return model(model.embed(batch["ids"], features, batch["slots"]), context, remat=remat)[0], features


def batch_loss(
    modules,
    batch: dict[str, jax.Array],
    *,
    remat: Remat = "none",
    hidden_of=packed_hidden,
    objective: Objective = NEXT_TOKEN,
):
    """Sum of the losses of a packed batch's units, auxiliary loss (0 without a head), and the objective's other sums.

    modules: {"model": QwenVL, "auxiliary": CellHead or absent}. The batch also has target_positions and targets int [B,
    K], and cell labels "cell/<name>" when there is an auxiliary head. hidden_of: the forward pass for its kind of rows,
    `packed_hidden` or `record_rows.record_hidden`. objective: what is minimised, here the loss of targets.
    """
    hidden, features = hidden_of(modules["model"], batch, remat=remat)
    total, sums = objective.losses(modules["model"], hidden, batch)
    return total, auxiliary_loss(modules, features, batch), sums


def auxiliary_loss(modules, features: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The loss of the head on the picture features, 0 where there is none."""
    if "auxiliary" not in modules:
        return jnp.zeros(())
    labels = {name.removeprefix("cell/"): value for name, value in batch.items() if name.startswith("cell/")}
    return cell_loss(modules["auxiliary"](features), labels)


def make_evaluation_step(rebuild, *, dtype: str | None = None, hidden_of=packed_hidden, examine=NEXT_TOKEN.examine):
    """(params, frozen, batch) -> what `examine` says of it, by default loss sum, target count, and bool [B, K] whether
    each target is the likeliest token.

    frozen, dtype and hidden_of as in `make_train_step`; examine: an objective's, or another of its form.
    """

    def evaluation_step(params: Parameters, frozen: Parameters, batch: dict[str, jax.Array]):
        params = {name: p if dtype is None else p.astype(dtype) for name, p in params.items()}
        model = rebuild(params | frozen)["model"]
        hidden, _ = hidden_of(model, batch)
        return examine(model, hidden, batch)

    return evaluation_step


def make_train_step(
    rebuild,
    optimizer: optax.GradientTransformation,
    auxiliary_schedule,
    *,
    dtype: str | None = None,
    remat: Remat = "none",
    vision_only: bool = False,
    hidden_of=packed_hidden,
    objective: Objective = NEXT_TOKEN,
    dropout: jax.Array | None = None,
):
    """(state, frozen, batches) -> (state, metrics of float32 scalars); jit it with the state donated.

    frozen: parameters that stay as they are. batches: arrays [A, ...] of A batches of one shape, whose gradients add up
    to that of one batch A times as large: every unit counts alike, however many a batch has. dtype: that in which the
    trained parameters are computed with; None: their own. The optimizer sees float32 parameters and gradients alone, so
    its memory is float32 too, and a bfloat16 parameter is rounded once, after its update.

    `vision_only` trains the vision tower by the auxiliary head alone; all other parameters stay as they are. hidden_of
    and objective: as in `batch_loss`. dropout: the key of the run, for adapters that drop in training; None: nothing is
    dropped.
    """

    def one_batch(params: Parameters, frozen: Parameters, batch, weight, share, key):
        """This batch's part of the loss, and the numbers that are logged. share: 1 / (units, batches) of the step."""
        modules = rebuild({name: p if dtype is None else p.astype(dtype) for name, p in params.items()} | frozen)
        if key is not None:
            modules = modules | {"model": with_dropout(modules["model"], key)}
        if vision_only:
            auxiliary = auxiliary_loss(modules, modules["model"].encode_images(batch["pixels"]), batch) * share[1]
            return auxiliary, {"loss": auxiliary, "auxiliary_loss": auxiliary}
        total, auxiliary, sums = batch_loss(modules, batch, remat=remat, hidden_of=hidden_of, objective=objective)
        loss, auxiliary = total * share[0], auxiliary * share[1]
        logged = {"loss": loss} | {name: value * share[0] for name, value in sums.items()}
        if "auxiliary" in modules:
            logged["auxiliary_loss"] = auxiliary
        return loss + weight * auxiliary, logged

    def train_step(state: TrainState, frozen: Parameters, batches: dict[str, jax.Array]):
        units = objective.units(batches).astype(jnp.float32)
        share = 1 / jnp.maximum(units, 1), 1 / batches["targets"].shape[0]
        weight = auxiliary_schedule(state.step)
        gradient = jax.grad(one_batch, has_aux=True)
        step_key = None if dropout is None else jax.random.fold_in(dropout, state.step)

        def add(sums, numbered):
            number, batch = numbered
            key = None if step_key is None else jax.random.fold_in(step_key, number)
            new = gradient(state.params, frozen, batch, weight, share, key)
            return jax.tree.map(lambda total, value: total + value.astype(jnp.float32), sums, new), None

        first = state.params, frozen, jax.tree.map(lambda x: x[0], batches), weight, share, step_key
        if batches["targets"].shape[0] == 1:
            grads, metrics = gradient(*first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(gradient, *first))
            (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(len(batches["targets"])), batches))
        grads, params = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (grads, state.params))
        updates, memory = optimizer.update(grads, state.optimizer, params)
        if vision_only:  # not even weight decay for the rest
            moving = ("model.visual.", "auxiliary.")
            updates = {k: u if k.startswith(moving) else jnp.zeros_like(u) for k, u in updates.items()}
        targets = jnp.sum(batches["targets"] >= 0).astype(jnp.float32) * (not vision_only)
        metrics |= {"target_tokens": targets, "gradient_norm": optax.tree.norm(grads)}
        new = {name: (p + updates[name]).astype(state.params[name].dtype) for name, p in params.items()}
        return TrainState(state.step + 1, new, memory), metrics

    return train_step
