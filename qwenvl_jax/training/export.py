"""What a run has trained, as a model folder or an adapter: its last state, or a checkpoint of it.

`python -m qwenvl_jax.convert runs/x/checkpoints/500 DST` calls `export_checkpoint`, which does not read the optimizer's
memory.
"""

from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from qwenvl_jax.checkpoints.folder import SmallFiles, locate, small_files
from qwenvl_jax.checkpoints.huggingface import save_model
from qwenvl_jax.checkpoints.peft import save_adapter
from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.training.build import build_modules, chat_settings, divide, lora_recipe
from qwenvl_jax.training.checkpoints import cause
from qwenvl_jax.training.placement import MeshRecipe, Placement
from qwenvl_jax.training.recipe import Recipe, read_recipe


def export(recipe: Recipe, model: QwenVL, folder: Path, vocabulary: Path) -> None:
    """Writes the model as a Hugging Face folder, with its vocabulary and generation settings."""
    if recipe.start is None:
        generation = {"chat_format": "chatml", "do_sample": False, "max_new_tokens": 256, "max_window_size": 1536}
        small = SmallFiles(tokenizer_file=vocabulary, tokenizer_config=None, generation_config=generation)
    else:
        small = small_files(locate(recipe.start))
        small["generation_config"] = chat_settings(recipe) or small["generation_config"]
    save_model(jax.tree.map(lambda x: x.astype(recipe.export_dtype), model), folder, **small)


def export_adapter(recipe: Recipe, model: QwenVL, folder: Path) -> None:
    """Writes the adapter in PEFT's format."""
    save_adapter(model, folder, lora_recipe(recipe), base=recipe.start, generation_config=chat_settings(recipe))


def export_checkpoint(checkpoint: str | Path, destination: str | Path) -> None:
    """Writes the model of a run's checkpoint as a Hugging Face folder, or its adapter in PEFT's format.

    checkpoint: a folder `RUN/checkpoints/STEP`; the recipe beside it names the model that was trained, and must find it
    where the run did. Reads parameters alone, onto one device. Raises UserError where they cannot be read.
    """
    checkpoint = Path(checkpoint).absolute()
    recipe = read_recipe(checkpoint.parent.parent / "recipe.yaml")
    placement = Placement(MeshRecipe(), 1)
    modules, _, vocabulary = build_modules(recipe, placement)
    trained, frozen, rebuild = divide(modules, recipe, placement)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trained)
    try:
        params = ocp.load_checkpointables(checkpoint, {"params": shapes})["params"]
    except Exception as error:  # whatever a damaged folder provokes in Orbax and TensorStore
        raise UserError(
            f"{checkpoint}: damaged or incomplete ({cause(error)}); name another checkpoint of the run"
        ) from None
    model = rebuild(params | frozen)["model"]
    if recipe.lora is None:
        export(recipe, model, Path(destination), vocabulary)
    else:
        export_adapter(recipe, model, Path(destination))
