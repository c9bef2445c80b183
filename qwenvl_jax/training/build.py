"""What a recipe trains: the modules, and which of their parameters move."""

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from qwenvl_jax.checkpoints.adapters import add_adapters, learning_rate_ratios, trainable_paths
from qwenvl_jax.checkpoints.folder import VOCABULARY, locate, read_config, small_files
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data.scenes import COLORS, GLYPHS, SHAPES, SIZES
from qwenvl_jax.models.quantised import quantised_linears
from qwenvl_jax.models.qwen_vl import QwenVL, unstack, with_image_size
from qwenvl_jax.models.vit import FEW_LAYERS
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.sharding import on_mesh
from qwenvl_jax.training.auxiliary import CellHead, CellTargets, start_local
from qwenvl_jax.training.loss import NEXT_TOKEN, Objective
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.preference import preference_objective
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.step import Parameters, make_train_step, named_parameters


def build_modules(recipe: Recipe, placement: Placement) -> tuple[dict[str, nnx.Module], QwenVLConfig, Path]:
    """The modules to train ({"model", and "auxiliary" if wanted}), the configuration and the vocabulary file."""
    config, vocabulary = configuration(recipe)
    if recipe.start is None:
        model = QwenVL(config, rngs=nnx.Rngs(recipe.seed))
        if recipe.new_model.start_local:
            start_local(model)
    else:
        folder = locate(recipe.start)
        dtype = None if recipe.lora is None else recipe.dtype  # without, `divide` decides for each parameter
        model = load_model(
            folder,
            dtype=dtype,
            mesh=placement.mesh,
            rules=placement.rules,
            stacked=True,
            quantize=recipe.quantize,
        )
        if recipe.image_size is not None:
            model = with_image_size(model, recipe.image_size)
    return completed(model, recipe), config, vocabulary


def configuration(recipe: Recipe) -> tuple[QwenVLConfig, Path]:
    """The model's configuration and its vocabulary file, without its weights."""
    if recipe.start is not None:
        folder = locate(recipe.start)
        config = read_config(folder)
        return config if recipe.image_size is None else config.with_image_size(recipe.image_size), folder / VOCABULARY
    shipped = importlib.resources.files("qwenvl_jax") / "assets" / "tiny" / VOCABULARY
    vocabulary = Path(recipe.new_model.vocabulary or str(shipped))
    tokenizer = Tokenizer.from_file(vocabulary, recipe.new_model.n_queries)
    config = recipe.new_model.config(tokenizer.image_start_id)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{vocabulary} needs new_model.vocab_size of at least {tokenizer.n_vocab}")
    return config, vocabulary


def completed(model: QwenVL, recipe: Recipe) -> dict[str, nnx.Module]:
    """The modules to train from a bare model with stacked layers: in the form it is trained in, adapted, with a head.

    Raises UserError for quantised weights without an adapter.
    """
    if quantised_linears(model) and recipe.lora is None:
        raise UserError(f"{recipe.start}: quantised weights cannot be trained; add lora, or start from float ones")
    if model.config.num_hidden_layers <= FEW_LAYERS:
        model = unstack(model)
    if recipe.lora is not None:
        model = add_adapters(model, lora_recipe(recipe), nnx.Rngs(recipe.seed))
    modules: dict[str, nnx.Module] = {"model": model}
    if recipe.auxiliary is not None:
        targets = CellTargets(*(1 + len(names) for names in (COLORS, SHAPES, SIZES, GLYPHS)))
        visual, cells = model.config.visual, recipe.data.cells
        modules["auxiliary"] = CellHead(visual, targets, cells=cells, rngs=nnx.Rngs(recipe.seed + 1))
    return modules


def _model(modules: dict[str, nnx.Module]) -> QwenVL:
    model = modules["model"]
    assert isinstance(model, QwenVL)
    return model


def lora_recipe(recipe: Recipe) -> LoraRecipe:
    """The recipe of the adapter, with the modules that a base model trains whole."""
    assert recipe.lora is not None
    assert recipe.start is not None
    return recipe.lora.for_checkpoint(small_files(locate(recipe.start))["generation_config"])


def chat_settings(recipe: Recipe) -> dict[str, Any] | None:
    """The generation settings of a base model that has learnt conversations; None where `start`'s own still hold."""
    assert recipe.start is not None
    own = small_files(locate(recipe.start))["generation_config"]
    learns_chats = recipe.records is None or recipe.records.template == "chat"
    if own is None or own.get("chat_format") == "chatml" or not learns_chats:
        return None
    return {**own, "chat_format": "chatml"}


def divide(
    modules: dict[str, nnx.Module], recipe: Recipe, placement: Placement
) -> tuple[Parameters, Parameters, Callable[[Parameters], Any]]:
    """The trained parameters and the frozen ones, by path, placed, and the function that makes modules of both.

    Trained ones are in float32 if the recipe wants masters, else in its dtype, as frozen ones are; those under an
    adapter stay as they were loaded. Modules of shapes give shapes. Raises UserError if all are frozen.
    """
    moving = None
    if recipe.lora is not None:
        moving = {f"model.{path}" for path in trainable_paths(_model(modules), lora_recipe(recipe))}
    shardings = placement.parameters(modules)
    params, rebuild = named_parameters(modules)
    trained: Parameters = {}
    frozen: Parameters = {}
    for path in list(params):
        value = params.pop(path)
        is_frozen = recipe.parts.of(path).freeze or (moving is not None and path not in moving)
        dtype = jnp.float32 if recipe.masters and not is_frozen else recipe.dtype
        if is_frozen and moving is not None:
            dtype = value.dtype
        placed: Any
        if isinstance(value, jax.ShapeDtypeStruct):
            placed = jax.ShapeDtypeStruct(value.shape, dtype, sharding=shardings[path])
        else:
            placed = jax.device_put(value.astype(dtype), shardings[path])
        (frozen if is_frozen else trained)[path] = placed
    if not any(path.startswith("model.") for path in trained):
        raise UserError("parts: everything is frozen; there is nothing to train")
    return trained, frozen, rebuild


def rate_ratios(modules: dict[str, nnx.Module], recipe: Recipe) -> dict[str, float]:
    """Factors of the learning rate by path: LoRA+'s, where the recipe has an adapter."""
    if recipe.lora is None:
        return {}
    ratios = learning_rate_ratios(_model(modules), lora_recipe(recipe))
    return {f"model.{path}": ratio for path, ratio in ratios.items() if ratio != 1}


def build_step(
    recipe: Recipe,
    mesh: Mesh,
    rebuild,
    optimizer: optax.GradientTransformation,
    forward: Callable,
    *,
    vision_only: bool = False,
):
    """The compiled step of a run, see `make_train_step`; the state is donated.

    forward: the forward pass for the rows that the run has. vision_only: the step of its first stage.
    """
    dropout = jax.random.key(recipe.seed) if recipe.lora is not None and recipe.lora.dropout > 0 else None
    step = make_train_step(
        rebuild,
        optimizer,
        auxiliary_schedule(recipe),
        dtype=recipe.dtype if recipe.dtype != "float32" else None,
        remat=recipe.remat,
        vision_only=vision_only,
        hidden_of=forward,
        dropout=dropout,
        objective=objective_of(recipe),
    )
    return jax.jit(on_mesh(step, mesh), donate_argnums=0)


def objective_of(recipe: Recipe) -> Objective:
    """What the steps make smaller: the loss of the next token, or of preferences."""
    return NEXT_TOKEN if recipe.dpo is None else preference_objective(recipe.dpo)


def auxiliary_schedule(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """step -> weight of the auxiliary loss."""
    if recipe.auxiliary is None:
        return lambda step: jnp.zeros(())
    a = recipe.auxiliary
    return lambda step: jnp.maximum(a.floor, a.weight - (a.weight - a.floor) * step / (a.until * recipe.steps))
