"""LoRA of a model of the released size on one GPU, of random weights: seconds of a step, MFU, peak memory.

`train_step.py --full-size` calls this. Rows are full and have one picture each; weights are bfloat16, the adapter and
its optimizer float32, layers are computed again in the backward pass, the vision tower is frozen: `configs/lora.yaml`.
"""

import datetime
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import described, machine
from flax import nnx
from rich.console import Console

from qwenvl_jax.checkpoints.adapters import add_adapters, trainable_paths
from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.training.flops import step_cost
from qwenvl_jax.training.optimizer import OptimizerRecipe, make_optimizer
from qwenvl_jax.training.record_rows import record_hidden
from qwenvl_jax.training.step import TrainState, make_train_step, named_parameters

RELEASED = QwenVLConfig(151936, 4096, 32, 32, 22016, VisionConfig(448, 14, 1664, 48, 16, 4.9231, 4096))


def full_rows(config: QwenVLConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """A batch [1, B, T] of rows that are one record each, a picture and its answer."""
    rng, visual = np.random.default_rng(0), config.visual
    ids = rng.integers(0, visual.image_start_id, (rows, length))
    slots = np.full((rows, length), -1)
    slots[:, 10 : 10 + visual.n_queries] = np.arange(rows * visual.n_queries).reshape(rows, -1)
    first = 10 + visual.n_queries
    targets = np.full((rows, length), -100)
    targets[:, : length - first - 1] = ids[:, first + 1 :]
    places = np.zeros((rows, length), int)
    places[:, : length - first - 1] = np.arange(first, length - 1)
    whole = {
        "ids": ids,
        "slots": slots,
        "positions": np.tile(np.arange(length), (rows, 1)),
        "group": np.ones((rows, length), int),
        "targets": targets,
        "target_positions": places,
    }
    pixels = rng.standard_normal((1, rows, 3, visual.image_size, visual.image_size), np.float32)
    return {name: jnp.asarray(value[None], jnp.int32) for name, value in whole.items()} | {"pixels": pixels}


def measure_full_size(options, config: QwenVLConfig = RELEASED) -> dict:
    """Numbers of `options.repetitions` steps after the first."""
    recipe = LoraRecipe(rank=options.lora_rank, dropout=0.0, modules_to_save=())
    model = add_adapters(QwenVL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), recipe, nnx.Rngs(1))
    moving = {f"model.{path}" for path in trainable_paths(model, recipe)}
    params, rebuild = named_parameters({"model": model})
    del model
    trained = {path: params.pop(path).astype(jnp.float32) for path in moving}
    optimizer = make_optimizer(OptimizerRecipe(), trained, 10_000)
    step = make_train_step(
        rebuild,
        optimizer,
        lambda step: jnp.zeros(()),
        dtype="bfloat16",
        remat="layers",
        hidden_of=partial(record_hidden, longest=options.length),
    )
    state = TrainState(jnp.zeros((), jnp.int32), trained, jax.jit(optimizer.init)(trained))
    batch = full_rows(config, options.rows, options.length)
    compiled = jax.jit(step, donate_argnums=0).lower(state, params, batch).compile()
    seconds: list[float] = []
    for _ in range(options.repetitions + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, params, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    device, rows, length = jax.devices()[0], options.rows, options.length
    learnt = int(jnp.sum(batch["targets"] >= 0))
    flops = step_cost(config, state.params).flops(rows * length, rows * length * (length + 1) / 2, learnt, rows)
    memory = device.memory_stats() or {}
    median = statistics.median(seconds[1:])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(("jax", "jaxlib", "flax", "optax", "numpy")),
        "parameters": sum(value.size for value in params.values()),
        "adapter_parameters": sum(value.size for value in state.params.values()),
        "rows": options.rows,
        "length": options.length,
        "seconds": seconds[1:],
        "tokens_per_second": options.rows * options.length / median,
        "flops": flops,
        "peak_tflops": options.peak_tflops,
        "mfu": flops / median / (options.peak_tflops * 1e12),
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def show_full_size(result: dict, console: Console) -> None:
    median, peak = statistics.median(result["seconds"]), result["peak_bytes"]
    console.print(
        f"LoRA of {result['parameters']:,} parameters ({result['adapter_parameters']:,} trained), bfloat16, "
        f"{result['rows']} rows of {result['length']} tokens\n"
        f"{median:.3f} s a step ({min(result['seconds']):.3f} to {max(result['seconds']):.3f}), "
        f"{result['tokens_per_second']:,.0f} tokens per second\n"
        f"[bold]MFU {result['mfu']:.1%}[/bold]: {result['flops'] / median / 1e12:.1f} of {result['peak_tflops']:.0f} "
        f"TFLOP/s; peak memory {'unknown' if peak is None else f'{peak / 2**30:.1f} GiB'}\n"
        f"{result['machine']['jax_device']}; {described(result['machine'])}"
    )
