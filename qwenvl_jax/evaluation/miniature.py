"""Draws small copies of the benchmarks' files, to try an evaluation without any of the real data.

    python -m qwenvl_jax.evaluation.miniature FOLDER [--samples 8] [--seed 0]

Layout, file names and fields are those of the official releases and of the original's converted files; the pictures
are this project's scenes, and the questions are about them. The scores mean nothing.
"""

import argparse
import sys
from pathlib import Path

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.miniatures import choices, others, pictures, vqa
from qwenvl_jax.evaluation.miniatures.studio import Studio


def draw(folder: Path, samples: int = 8, seed: int = 0) -> None:
    """Every dataset of `tasks.registry`, with training files. Raises UserError for a folder that holds something."""
    if samples < 1:
        raise UserError("--samples: at least one is needed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not an empty folder; name a new one")
    studio = Studio(folder, samples, seed)
    for family in (pictures, vqa, choices, others):
        family.draw(studio)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw miniatures of all benchmarks.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=8, help="of each benchmark")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        draw(options.folder, options.samples, options.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
