"""Train a recipe: `python train.py configs/RECIPE.yaml [--section.field VALUE ...]`; see qwenvl_jax/training."""

from qwenvl_jax.training.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
