"""What a recipe trains: the modules, and which of their parameters move."""

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.checkpoints.folder import VOCABULARY, locate, read_config
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data.scenes import COLORS, GLYPHS, SHAPES, SIZES
from qwenvl_jax.models.quantised import quantised_linears
from qwenvl_jax.models.qwen_vl import QwenVL, unstack
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.auxiliary import CellHead, CellTargets, start_local
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.step import Parameters, named_parameters

FEW_LAYERS = 8  # run faster one by one; a deeper stack is scanned, or compiling takes minutes


def build_modules(recipe: Recipe, placement: Placement) -> tuple[dict[str, nnx.Module], QwenVLConfig, Path]:
    """The modules to train ({"model", and "auxiliary" if wanted}), the configuration and the vocabulary file."""
    if recipe.start is None:
        shipped = importlib.resources.files("qwenvl_jax") / "assets" / "tiny" / VOCABULARY
        vocabulary = Path(recipe.new_model.vocabulary or str(shipped))
        tokenizer = Tokenizer.from_file(vocabulary, recipe.new_model.n_queries)
        config = recipe.new_model.config(tokenizer.image_start_id)
        if tokenizer.n_vocab > config.vocab_size:
            raise UserError(f"{vocabulary} needs new_model.vocab_size of at least {tokenizer.n_vocab}")
        model = QwenVL(config, rngs=nnx.Rngs(recipe.seed))
        if recipe.new_model.start_local:
            start_local(model)
    else:
        folder = locate(recipe.start)
        config, vocabulary = read_config(folder), folder / VOCABULARY
        model = load_model(folder, mesh=placement.mesh, rules=placement.rules, stacked=True)
        if quantised_linears(model):
            raise UserError(f"{folder}: the weights are quantised, and these cannot be trained; start from float ones")
    modules: dict[str, nnx.Module] = {"model": unstack(model) if config.num_hidden_layers <= FEW_LAYERS else model}
    if recipe.auxiliary is not None:
        targets = CellTargets(*(1 + len(names) for names in (COLORS, SHAPES, SIZES, GLYPHS)))
        modules["auxiliary"] = CellHead(config.visual, targets, cells=recipe.data.cells, rngs=nnx.Rngs(recipe.seed + 1))
    return modules, config, vocabulary


def divide(
    modules: dict[str, nnx.Module], recipe: Recipe, placement: Placement
) -> tuple[Parameters, Parameters, Callable[[Parameters], Any]]:
    """The trained parameters and the frozen ones, by path, placed, and the function that makes modules of both.

    Frozen ones are in the recipe's dtype, trained ones in float32 if it wants masters. Raises UserError if all are
    frozen.
    """
    shardings = placement.parameters(modules)
    params, rebuild = named_parameters(modules)
    trained: Parameters = {}
    frozen: Parameters = {}
    for path in list(params):
        is_frozen = recipe.parts.of(path).freeze
        dtype = jnp.float32 if recipe.masters and not is_frozen else recipe.dtype
        placed = jax.device_put(params.pop(path).astype(dtype), shardings[path])
        (frozen if is_frozen else trained)[path] = placed
    if not any(path.startswith("model.") for path in trained):
        raise UserError("parts: everything is frozen; there is nothing to train")
    return trained, frozen, rebuild


def auxiliary_schedule(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """step -> weight of the auxiliary loss."""
    if recipe.auxiliary is None:
        return lambda step: jnp.zeros(())
    a = recipe.auxiliary
    return lambda step: jnp.maximum(a.floor, a.weight - (a.weight - a.floor) * step / (a.until * recipe.steps))
