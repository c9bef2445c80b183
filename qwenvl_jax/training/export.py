"""A checkpoint of a run as what it trains: a model folder, or an adapter. The optimizer's memory is not read.

`python -m qwenvl_jax.convert runs/x/checkpoints/500 DST` calls this; a run writes its last state by itself.
"""

from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from qwenvl_jax.config import UserError
from qwenvl_jax.training.build import build_modules, divide
from qwenvl_jax.training.checkpoints import cause
from qwenvl_jax.training.placement import MeshRecipe, Placement
from qwenvl_jax.training.recipe import read_recipe
from qwenvl_jax.training.run import export, export_adapter


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
