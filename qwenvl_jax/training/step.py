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
from qwenvl_jax.training.loss import next_token_loss

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


def batch_loss(modules, batch: dict[str, jax.Array], *, remat: Remat = "none", hidden_of=packed_hidden):
    """Sum of the losses of a packed batch's targets, auxiliary loss (0 without a head), and the number of targets.

    modules: {"model": QwenVL, "auxiliary": CellHead or absent}. The batch also has target_positions and targets int [B,
    K], and cell labels "cell/<name>" when there is an auxiliary head. hidden_of: the forward pass for its kind of rows,
    `packed_hidden` or `record_rows.record_hidden`.
    """
    hidden, features = hidden_of(modules["model"], batch, remat=remat)
    total, count = next_token_loss(modules["model"], hidden, batch["target_positions"], batch["targets"])
    return total, auxiliary_loss(modules, features, batch), count


def auxiliary_loss(modules, features: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The loss of the head on the picture features, 0 where there is none."""
    if "auxiliary" not in modules:
        return jnp.zeros(())
    labels = {name.removeprefix("cell/"): value for name, value in batch.items() if name.startswith("cell/")}
    return cell_loss(modules["auxiliary"](features), labels)


def make_evaluation_step(rebuild, *, dtype: str | None = None, hidden_of=packed_hidden):
    """(params, frozen, batch) -> (loss sum, target count, right bool [B, K]): whether each target is the likeliest
    token.

    frozen, dtype and hidden_of as in `make_train_step`.
    """

    def evaluation_step(params: Parameters, frozen: Parameters, batch: dict[str, jax.Array]):
        params = {name: p if dtype is None else p.astype(dtype) for name, p in params.items()}
        model = rebuild(params | frozen)["model"]
        hidden, _ = hidden_of(model, batch)
        total, count = next_token_loss(model, hidden, batch["target_positions"], batch["targets"])
        picked = jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1)
        return total, count, jnp.argmax(model.logits(picked), axis=-1) == batch["targets"]

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
    dropout: jax.Array | None = None,
):
    """(state, frozen, batches) -> (state, metrics of float32 scalars); jit it with the state donated.

    frozen: parameters that stay as they are. batches: arrays [A, ...] of A batches of one shape, whose gradients add up
    to that of one batch A times as large: every target counts alike, however many a batch has. dtype: that in which the
    trained parameters are computed with; None: their own. The optimizer sees float32 parameters and gradients alone, so
    its memory is float32 too, and a bfloat16 parameter is rounded once, after its update.

    `vision_only` trains the vision tower by the auxiliary head alone; all other parameters stay as they are. hidden_of:
    as in `batch_loss`. dropout: the key of the run, for adapters that drop in training; None: nothing is dropped.
    """

    def one_batch(params: Parameters, frozen: Parameters, batch, weight, share, key):
        """This batch's part of the loss, and the numbers that are logged. share: 1 / (targets, batches) of the step."""
        modules = rebuild({name: p if dtype is None else p.astype(dtype) for name, p in params.items()} | frozen)
        if key is not None:
            modules = modules | {"model": with_dropout(modules["model"], key)}
        if vision_only:
            total, count = jnp.zeros(()), jnp.zeros(())
            auxiliary = auxiliary_loss(modules, modules["model"].encode_images(batch["pixels"]), batch)
            return auxiliary * share[1], (auxiliary * share[1], auxiliary * share[1], count)
        total, auxiliary, count = batch_loss(modules, batch, remat=remat, hidden_of=hidden_of)
        loss = total * share[0]
        return loss + weight * auxiliary * share[1], (loss, auxiliary * share[1], count)

    def train_step(state: TrainState, frozen: Parameters, batches: dict[str, jax.Array]):
        targets = jnp.sum(batches["targets"] >= 0).astype(jnp.float32)
        share = 1 / jnp.maximum(targets, 1), 1 / batches["targets"].shape[0]
        weight = auxiliary_schedule(state.step)
        gradient = jax.grad(one_batch, has_aux=True)
        step_key = None if dropout is None else jax.random.fold_in(dropout, state.step)

        def add(sums, numbered):
            number, batch = numbered
            key = None if step_key is None else jax.random.fold_in(step_key, number)
            new = gradient(state.params, frozen, batch, weight, share, key)
            return jax.tree.map(lambda total, value: total + value.astype(jnp.float32), sums, new), None

        if batches["targets"].shape[0] == 1:
            grads, (loss, auxiliary, count) = gradient(
                state.params, frozen, jax.tree.map(lambda x: x[0], batches), weight, share, step_key
            )
        else:
            zeros = {name: jnp.zeros(p.shape, jnp.float32) for name, p in state.params.items()}, (jnp.zeros(()),) * 3
            (grads, (loss, auxiliary, count)), _ = jax.lax.scan(
                add, zeros, (jnp.arange(len(batches["targets"])), batches)
            )
        grads, params = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (grads, state.params))
        updates, memory = optimizer.update(grads, state.optimizer, params)
        if vision_only:  # not even weight decay for the rest
            moving = ("model.visual.", "auxiliary.")
            updates = {k: u if k.startswith(moving) else jnp.zeros_like(u) for k, u in updates.items()}
        metrics = {"loss": loss, "target_tokens": count, "gradient_norm": optax.tree.norm(grads)}
        if any(name.startswith("auxiliary.") for name in params):
            metrics["auxiliary_loss"] = auxiliary
        new = {name: (p + updates[name]).astype(state.params[name].dtype) for name, p in params.items()}
        return TrainState(state.step + 1, new, memory), metrics

    return train_step
