"""One training step as pure functions over named parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.nn.attention import packed_blocks
from qwenvl_jax.training.auxiliary import cell_loss
from qwenvl_jax.training.loss import next_token_loss

Parameters = dict[str, jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "optimizer"), meta_fields=())
@dataclasses.dataclass
class TrainState:
    """What a step changes: the number of steps done, parameters by path, the optimizer's memory."""

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


def packed_hidden(model, batch: dict[str, jax.Array], *, remat: bool = False) -> tuple[jax.Array, jax.Array]:
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


def forward_loss(
    modules, batch: dict[str, jax.Array], auxiliary_weight: jax.Array, *, remat: bool, hidden_of=packed_hidden
):
    """Loss of a packed batch and its parts.

    modules: {"model": QwenVL, "auxiliary": CellHead or absent}. The batch also has target_positions and targets int [B,
    K], and cell labels "cell/<name>" when there is an auxiliary head. hidden_of: the forward pass for its kind of rows.
    """
    model = modules["model"]
    hidden, features = hidden_of(model, batch, remat=remat)
    total, count = next_token_loss(model, hidden, batch["target_positions"], batch["targets"])
    loss = total / jnp.maximum(count, 1)
    metrics = {"loss": loss, "target_tokens": count}
    if "auxiliary" in modules:
        labels = {name.removeprefix("cell/"): value for name, value in batch.items() if name.startswith("cell/")}
        auxiliary = cell_loss(modules["auxiliary"](features), labels)
        metrics["auxiliary_loss"] = auxiliary
        loss = loss + auxiliary_weight * auxiliary
    return loss, metrics


def make_evaluation_step(rebuild, *, hidden_of=packed_hidden):
    """(params, batch) -> (loss sum, target count, right bool [B, K]): whether each target is the likeliest token."""

    def evaluation_step(params: Parameters, batch: dict[str, jax.Array]):
        model = rebuild(params)["model"]
        hidden, _ = hidden_of(model, batch)
        total, count = next_token_loss(model, hidden, batch["target_positions"], batch["targets"])
        picked = jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1)
        return total, count, jnp.argmax(model.logits(picked), axis=-1) == batch["targets"]

    return evaluation_step


def vision_loss(modules, batch: dict[str, jax.Array]):
    """The auxiliary loss alone: what the vision tower learns before the language model joins."""
    labels = {name.removeprefix("cell/"): value for name, value in batch.items() if name.startswith("cell/")}
    loss = cell_loss(modules["auxiliary"](modules["model"].encode_images(batch["pixels"])), labels)
    return loss, {"loss": loss, "auxiliary_loss": loss, "target_tokens": jnp.zeros(())}


def make_train_step(
    rebuild,
    optimizer: optax.GradientTransformation,
    auxiliary_schedule,
    *,
    remat: bool = False,
    vision_only: bool = False,
    hidden_of=packed_hidden,
):
    """(state, batch) -> (state, metrics of float32 scalars); jit it with the state donated.

    `vision_only` trains the vision tower by the auxiliary head alone; all other parameters stay as they are. hidden_of:
    `packed_hidden`, or `record_rows.record_hidden` with its `longest` bound, for rows of records.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss_of(params):
            if vision_only:
                return vision_loss(rebuild(params), batch)
            weight = auxiliary_schedule(state.step)
            return forward_loss(rebuild(params), batch, weight, remat=remat, hidden_of=hidden_of)

        grads, metrics = jax.grad(loss_of, has_aux=True)(state.params)
        updates, memory = optimizer.update(grads, state.optimizer, state.params)
        if vision_only:  # not even weight decay for the rest
            moving = ("model.visual.", "auxiliary.")
            updates = {k: u if k.startswith(moving) else jnp.zeros_like(u) for k, u in updates.items()}
        metrics["gradient_norm"] = optax.global_norm(grads)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), memory), metrics

    return train_step
