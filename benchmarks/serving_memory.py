"""The table of docs/operations.md: how many replies at once the 9.6B model has room for, by GPU, weights and cache.

`python benchmarks/serving_memory.py [--max-length 2048]`. Computed from shapes by `inference/memory.py`, as the
server does before it starts: nothing is run, and neither weights nor a GPU are needed.
"""

import argparse
import itertools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from full_size import RELEASED

from qwenvl_jax.inference.engine import CacheForm, EngineOptions
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.memory import GIB, held, plan_memory
from qwenvl_jax.models.quantised import Quantisation, quantise
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.training.planned_devices import HARDWARE

GPUS = {"rtx4090": "RTX 4090", "a100-80g": "A100 80 GB", "h100": "H100", "h200": "H200"}
WEIGHTS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
CACHES: tuple[CacheForm, ...] = ("model", "int8")
PREFIXES = (16384, 0)
FRACTION = 0.95  # XLA_PYTHON_CLIENT_MEM_FRACTION
MOST_SLOTS = 512


def model_shapes(form: str | None) -> SimpleNamespace:
    """What `plan_memory` asks of a generator, of the released shape in bfloat16 or quantised."""
    model = nnx.eval_shape(lambda: QwenVL(RELEASED, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    if form is not None:
        model = jax.eval_shape(lambda whole: quantise(whole, Quantisation(form)), model)
    leaves = jax.tree.leaves(model)
    features = SimpleNamespace(dtype=jnp.dtype(jnp.bfloat16))
    return SimpleNamespace(config=RELEASED, leaves=leaves, layout=Layout(leaves), features=lambda pictures: features)


def most_slots(shapes: SimpleNamespace, max_length: int, prefixes: int, cache: CacheForm, available: int) -> int:
    """The largest number of slots that fits; 0 where one does not."""
    fitting = 0
    for slots in range(1, MOST_SLOTS + 1):
        options = EngineOptions(slots, max_length, prefixes=prefixes, cache=cache)
        if not plan_memory(shapes, options, available).fits:  # type: ignore[arg-type]
            break
        fitting = slots
    return fitting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-length", type=int, default=2048)
    length = parser.parse_args().max_length
    print("| weights | GiB | cache | " + " | ".join(GPUS.values()) + " |")
    print("|---" * (len(GPUS) + 3) + "|")
    shapes_of = {name: model_shapes(form) for name, form in WEIGHTS.items()}
    for (name, shapes), cache in itertools.product(shapes_of.items(), CACHES):
        cells = []
        for gpu in GPUS:
            available = int(FRACTION * HARDWARE[gpu].memory * GIB)
            with_prefixes, without = (most_slots(shapes, length, count, cache, available) for count in PREFIXES)
            cells.append(f"{with_prefixes} / {without}" if without else "–")
        weights = sum(map(held, shapes.leaves)) / GIB
        print(f"| {name} | {weights:.1f} | {cache} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
