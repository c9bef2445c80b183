"""What a recipe needs on machines that are not there: its own train step, compiled from shapes alone.

No weights and no records are read and nothing is run. What arrays need is exact. What lies between them, activations
and gradients, is the compiler's figure: that of the TPU compiler where `libtpu` is installed, which needs no TPU, else
that of the compiler for CPUs, which is too high for bfloat16 (docs/memory.md).
"""

import dataclasses
import importlib.resources
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.checkpoints.quantised import stored_quantisation
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data.scene_rows import SceneRows
from qwenvl_jax.models.quantised import Quantisation, quantise
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.training.build import build_step, completed, configuration, divide, rate_ratios
from qwenvl_jax.training.evaluation import device_batch, validation_batches
from qwenvl_jax.training.optimizer import make_optimizer
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.planned_devices import PlanRecipe, planned_devices
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.record_rows import record_hidden
from qwenvl_jax.training.step import TrainState, packed_hidden

GIB = 2**30
# Effort towards fast programs, that is. Memory is the same, and the TPU compiler takes less than half the time. Later
# versions of JAX have no such option.
LITTLE_EFFORT: dict[str, Any] = {"exec_time_optimization_effort": -1.0} if jax.__version_info__ < (0, 11) else {}
PAIRS = 8  # of answers in a row of a preference run; they weigh next to nothing


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device holds, in bytes, and how that is known."""

    trained: int
    frozen: int
    optimizer: int
    batch: int
    temporaries: int  # gradients, activations, weights of a layer gathered or widened for its use
    sequences: int  # computed at once
    compiler: str

    @property
    def peak(self) -> int:
        return self.trained + self.frozen + self.optimizer + self.batch + self.temporaries


def plan(recipe: Recipe, options: PlanRecipe) -> Plan:
    """Compiles the recipe's step for the devices of the options. Raises UserError for what cannot be planned."""
    recipe = _known(recipe)
    devices, compiler = planned_devices(options)
    step, (state, frozen, batch) = abstract_step(recipe, devices, options.pictures)
    sequences = batch["ids"].sharding.shard_shape(batch["ids"].shape)[1]
    arrays = {"trained": state.params, "frozen": frozen, "optimizer": (state.optimizer, state.step), "batch": batch}
    parts = {name: bytes_on_a_device(tree) for name, tree in arrays.items()}
    try:
        memory = step.lower(state, frozen, batch).compile(compiler_options=LITTLE_EFFORT).memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # the TPU compiler makes no program that does not fit
        needed = _needed(str(error))
    else:
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed += memory.temp_size_in_bytes
    return Plan(**parts, temporaries=needed - sum(parts.values()), sequences=sequences, compiler=compiler)


def _needed(error: str) -> int:
    """The bytes that a program needs, from the error that says that there are not as many."""
    found = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|memory required .*?\(([\d.]+)([KMG])\)", error)
    if found is None:
        raise UserError(f"plan: the step does not compile: {error.splitlines()[0]}")
    number, unit = found[1] or found[3], found[2] or found[4]
    return int(float(number) * 1024 ** (1 + "KMG".index(unit)))


def abstract_step(recipe: Recipe, devices: Sequence[jax.Device], pictures: float):
    """The recipe's jitted train step and its arguments (state, frozen, batch), shapes on a mesh of these devices."""
    placement = Placement(recipe.mesh, recipe.batch_size // recipe.accumulate, devices)
    modules, config, vocabulary = abstract_modules(recipe)
    params, frozen, rebuild = divide(modules, recipe, placement)
    optimizer = make_optimizer(recipe.optimizer, params, recipe.steps, recipe.parts, rate_ratios(modules, recipe))
    start: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.everywhere)
    state = TrainState(start, params, placement.optimizer_shapes(optimizer, params))
    if recipe.records is None:
        rows = SceneRows(recipe.data, str(vocabulary), config, recipe.steps, placement.batch_size)
        shapes, forward = device_batch(validation_batches(rows, 1)[0]), packed_hidden
    else:
        shapes = record_batch(recipe, config, placement, pictures)
        forward = partial(record_hidden, longest=recipe.records.batches.max_length)
    batch = {
        name: jax.ShapeDtypeStruct((recipe.accumulate, *value.shape), value.dtype, sharding=placement.of_step)
        for name, value in shapes.items()
    }
    return build_step(recipe, placement.mesh, rebuild, optimizer, forward), (state, frozen, batch)


def abstract_modules(recipe: Recipe) -> tuple[dict[str, nnx.Module], QwenVLConfig, Path]:
    """What `build_modules` makes, with shapes in place of arrays."""
    config, vocabulary = configuration(recipe)
    model = nnx.eval_shape(lambda: QwenVL(config, dtype=jnp.dtype(recipe.dtype), rngs=nnx.Rngs(0)))
    form = None if recipe.start is None else stored_quantisation(locate(recipe.start))
    if form is None and recipe.quantize is not None:
        form = Quantisation(recipe.quantize)

    def build(model: QwenVL) -> dict[str, nnx.Module]:
        return completed(model if form is None else quantise(model, form), recipe)

    return jax.eval_shape(build, model), config, vocabulary


def record_batch(recipe: Recipe, config: QwenVLConfig, placement: Placement, pictures: float) -> dict[str, Any]:
    """Shapes of a batch of records, see `RecordBatches`. pictures: in a row, on average."""
    assert recipe.records is not None
    wanted, rows, size = recipe.records.batches, placement.batch_size, config.visual.image_size
    names = ("ids", "slots", "positions", "group", "target_positions", "targets")
    shapes = {name: jax.ShapeDtypeStruct((rows, wanted.max_length), np.int32) for name in names}
    if recipe.dpo is not None:
        shapes |= dict.fromkeys(("branch", "target_answer"), shapes["ids"])
        shapes["record"] = jax.ShapeDtypeStruct((rows, PAIRS), np.int32)
        shapes["reference"] = jax.ShapeDtypeStruct((rows, PAIRS, 2), np.float32)
    slots = math.ceil(pictures) * rows if wanted.pictures is None else wanted.pictures
    if slots and recipe.records.cache_features:
        features = (slots, config.visual.n_queries, config.visual.output_dim)
        shapes["features"] = jax.ShapeDtypeStruct(features, np.dtype(recipe.dtype))
    elif slots:
        shapes["pixels"] = jax.ShapeDtypeStruct((slots, 3, size, size), np.float32)
    return shapes


def bytes_on_a_device(tree: Any) -> int:
    """What one device holds of arrays or shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def _known(recipe: Recipe) -> Recipe:
    """The recipe with a start whose configuration is on this machine: shipped, for the models that are known."""
    shipped = Path(str(importlib.resources.files("qwenvl_jax"))) / "assets" / "known"
    names = sorted(path.parent.relative_to(shipped).as_posix() for path in shipped.glob("*/*/config.json"))
    if recipe.start in names:
        return dataclasses.replace(recipe, start=str(shipped / recipe.start))
    if recipe.start is None or recipe.start == "tiny" or Path(recipe.start).expanduser().exists():
        return recipe
    raise UserError(f"plan: {recipe.start} is no folder; name one that has a config.json, or {', '.join(names)}")


def report(recipe: Recipe, options: PlanRecipe, found: Plan) -> tuple[str, bool]:
    """What a person reads of a plan, and whether it fits."""
    device = options.hardware
    lines = {
        "trained parameters": found.trained,
        "frozen parameters": found.frozen,
        "optimizer": found.optimizer,
        "batch": found.batch,
        "gradients and activations": found.temporaries,
        "together": found.peak,
    }
    fits = found.peak <= device.usable * GIB
    verdict = "fits" if fits else f"does not fit: {found.peak / GIB - device.usable:.1f} GiB too much"
    where = f"{options.devices} x {options.device}, mesh {recipe.mesh.preset}"
    text = [
        f"{where}, on each device at once {found.sequences} of {recipe.batch_size} sequences",
        *(f"{name:<26}{value / GIB:8.2f} GiB" for name, value in lines.items()),
        f"usable of {device.memory:g} GiB{device.usable:>13.2f} GiB",
        verdict,
        *(f"  try {line}" for line in ([] if fits else advice(recipe, options, found))),
        f"Figures are for each device; compiled by {found.compiler}.",
    ]
    return "\n".join(text), fits


def advice(recipe: Recipe, options: PlanRecipe, found: Plan) -> list[str]:
    """Changes of the recipe that lower what it needs most of, as flags."""
    lines = []
    if recipe.mesh.preset == "single" and options.devices > 1:
        lines.append("--mesh.preset fsdp, which divides parameters and optimizer over the devices")
    if recipe.remat != "layers":
        lines.append("--remat layers, which keeps of each layer its input alone")
    if found.sequences > 1:
        fewer = recipe.accumulate * found.sequences
        lines.append(f"--accumulate {fewer}, one sequence at a time on each device")
    if recipe.dtype == "float32":
        lines.append("--dtype bfloat16, which halves activations and frozen parameters")
    if recipe.lora is None and found.trained + found.optimizer > found.peak / 2:
        lines.append("--optimizer.name adafactor, whose memory is small, or configs/lora.yaml, which trains an adapter")
    if recipe.lora is not None and recipe.quantize is None and found.frozen > found.peak / 4:
        lines.append("--quantize nf4, which holds the language model in a quarter of the memory")
    if recipe.records is not None and found.temporaries > found.peak / 2:
        lines.append("a smaller --records.batches.max_length")
    if recipe.mesh.preset == "fsdp" or options.devices == 1:
        lines.append("--plan.devices with more of them" + (", and --mesh.preset fsdp" if options.devices == 1 else ""))
    return lines
