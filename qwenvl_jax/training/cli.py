"""The command `qwenvl-train` and `train.py`."""

import errno
import sys

from absl import logging

from qwenvl_jax.config import UserError
from qwenvl_jax.training.planned_devices import PlanRecipe, start_without_machines
from qwenvl_jax.training.recipe import Recipe, parse_arguments, parse_plan


def main() -> int:
    """Trains a recipe, or says with --plan whether it would fit.

    Returns 0 at its end or when it was told to stop (SIGTERM), 1 when the loss is no longer a number, 2 with one line
    for a mistake in the command or the recipe. Of a plan, 0 if the recipe fits and 1 if it does not.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax tells of an error in every thread; what it raises is told below
    try:
        arguments, options = parse_plan(sys.argv[1:])
        recipe = parse_arguments(arguments)
        if options is not None:
            return _plan(recipe, options)
        if recipe.records is not None and not recipe.records.files:
            raise UserError("records.files is empty; name what to learn, for example --records.files mine.json")
        from qwenvl_jax.training.run import train  # JAX starts here; a mistyped flag should not wait for it

        folder = train(recipe)
    except UserError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = error.filename or recipe.output  # a file that is open already is not named by the system
        again = "make room, and the same command goes on from its newest checkpoint"
        print(f"train: {where}: {error.strerror}; {again}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    if folder is None:
        print("stopped and saved; the same command goes on")
    else:
        print(f"model written to {folder}")
    return 0


def _plan(recipe: Recipe, options: PlanRecipe) -> int:
    start_without_machines(options.devices)
    from qwenvl_jax.training.plan import plan, report

    text, fits = report(recipe, options, plan(recipe, options))
    print(text)
    return 0 if fits else 1
