"""The table of docs/memory.md: what fine-tuning the 9.6B model needs of a device, by method, devices and length.

`python benchmarks/memory_table.py [--devices 1,8,64] [--lengths 384,1024,2048]`. Nothing is run and no weights are
needed. Install `libtpu` for figures of the TPU compiler; without it those of the compiler for CPUs are printed.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from qwenvl_jax.training.planned_devices import HARDWARE, PlanRecipe, start_without_machines
from qwenvl_jax.training.recipe import read_recipe

METHODS = {
    "full": ("finetune.yaml", None),
    "LoRA": ("lora.yaml", None),
    "QLoRA": ("lora.yaml", "nf4"),
}
COLUMNS = ("trained", "frozen", "optimizer", "temporaries", "peak")
CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="1,8,64")
    parser.add_argument("--lengths", default="384,1024,2048")
    options = parser.parse_args()
    devices, lengths = ([int(part) for part in text.split(",")] for text in (options.devices, options.lengths))
    start_without_machines(max(devices))
    from qwenvl_jax.training.plan import GIB, plan

    print("| method | devices | length | " + " | ".join(COLUMNS) + " | h100 | h200 |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    compilers = set()
    for count in devices:
        for method, (file, quantize) in METHODS.items():
            for length in lengths:
                recipe = read_recipe(CONFIGS / file)
                assert recipe.records is not None
                batches = dataclasses.replace(recipe.records.batches, max_length=length)
                mesh = dataclasses.replace(recipe.mesh, preset="single" if count == 1 else "fsdp")
                recipe = dataclasses.replace(
                    recipe,
                    quantize=quantize,
                    mesh=mesh,
                    batch_size=count,
                    accumulate=1,
                    records=dataclasses.replace(recipe.records, batches=batches),
                )
                found = plan(recipe, PlanRecipe(devices=count))
                compilers.add(found.compiler)
                sizes = [f"{getattr(found, column) / GIB:.1f}" for column in COLUMNS]
                fits = ["yes" if found.peak <= HARDWARE[name].usable * GIB else "no" for name in ("h100", "h200")]
                print(f"| {method} | {count} | {length} | {' | '.join(sizes + fits)} |", flush=True)
    print(f"\nGiB on each device; compiled by {', '.join(compilers)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
