"""A training run from a recipe: build, resume, step, watch, save, export. `train.py` calls `train`."""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.experimental import multihost_utils

from qwenvl_jax.checkpoints.folder import SmallFiles, locate, small_files
from qwenvl_jax.checkpoints.huggingface import save_model
from qwenvl_jax.checkpoints.peft import save_adapter
from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.sharding import on_mesh
from qwenvl_jax.training.build import build_modules, build_step, divide, lora_recipe, rate_ratios
from qwenvl_jax.training.checkpoints import Checkpoints
from qwenvl_jax.training.data import open_data
from qwenvl_jax.training.evaluation import evaluate
from qwenvl_jax.training.hosts import connect
from qwenvl_jax.training.log import RunLog
from qwenvl_jax.training.optimizer import make_optimizer, schedule
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.step import TrainState, make_evaluation_step


class StopRequest:
    """Whether the machine is being taken away: SIGTERM is noted, and acted upon between two steps."""

    def __enter__(self) -> "StopRequest":
        self.received = False
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_) -> None:
        self.received = True

    def at(self, step: int) -> bool:
        """Whether to stop after this step; the same on every host."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received


def train(recipe: Recipe) -> Path | None:
    """Runs the recipe to its end, from the newest checkpoint in its output folder if there is one.

    Returns the folder of the exported model, or None after SIGTERM, when a checkpoint has been saved. Raises UserError
    when the folder holds a run of another recipe, and FloatingPointError naming the step when the loss is no longer a
    number.
    """
    connect(recipe.hosts)
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    _remember_recipe(recipe, output)
    placement = Placement(recipe.mesh, recipe.batch_size // recipe.accumulate)
    modules, config, vocabulary = build_modules(recipe, placement)
    data = open_data(recipe, config, vocabulary, placement)
    recipe = dataclasses.replace(recipe, steps=data.steps)
    params, frozen, rebuild = divide(modules, recipe, placement)
    optimizer = make_optimizer(recipe.optimizer, params, recipe.steps, recipe.parts, rate_ratios(modules, recipe))
    del modules
    start = jax.device_put(jnp.zeros((), jnp.int32), placement.everywhere)
    state = TrainState(start, params, placement.optimizer(optimizer, params))
    dtype = recipe.dtype if recipe.dtype != "float32" else None
    step = build_step(recipe, placement.mesh, rebuild, optimizer, data.forward)
    vision_step = build_step(recipe, placement.mesh, rebuild, optimizer, data.forward, vision_only=True)
    alone = 0 if recipe.auxiliary is None else recipe.auxiliary.alone_steps
    examine = on_mesh(make_evaluation_step(rebuild, dtype=dtype, hidden_of=data.forward), placement.mesh)
    evaluation_step = jax.jit(examine, out_shardings=placement.everywhere)

    rate = schedule(recipe.optimizer, recipe.optimizer.learning_rate, recipe.steps)

    with (
        contextlib.closing(Checkpoints(output / "checkpoints", recipe.keep)) as checkpoints,
        contextlib.closing(data.batches(checkpoints.latest or 0)) as batches,
        RunLog(output, recipe.steps, checkpoints.latest or 0, params | frozen, set(params)) as log,
        StopRequest() as stop,
    ):
        for note in data.notes:
            log.console.print(note)
        if checkpoints.latest is not None:
            state = checkpoints.load(state)
        first = int(state.step)
        waited, metrics = 0.0, []
        for number in range(first + 1, recipe.steps + 1):
            began = time.perf_counter()
            batch = placement.batches(next(batches))
            waited += time.perf_counter() - began
            state, step_metrics = (vision_step if number <= alone else step)(state, frozen, batch)
            metrics.append(step_metrics)
            stopping = stop.at(number)
            last = number == recipe.steps
            if number % recipe.log_every == 0 or last or stopping:
                _check(metrics, number, data.where)
                values = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
                values |= {"learning_rate": float(rate(number)), "data_wait": waited / len(metrics)}
                log.steps(number, values, len(metrics))
                waited, metrics = 0.0, []
            result = None
            if data.validation and (number % recipe.evaluate_every == 0 or last):
                result = evaluate(partial(evaluation_step, state.params, frozen), data.validation)
                log.evaluation(number, result)
            if number % recipe.save_every == 0 or last or stopping:
                _check(metrics, number, data.where)
                checkpoints.save(state, number, result["loss"] if result else None)
            if stopping and not last:
                return None
    model = rebuild(state.params | frozen)["model"]
    return export(recipe, model, output, vocabulary) if recipe.lora is None else export_adapter(recipe, model, output)


def _check(metrics: list[dict[str, jax.Array]], number: int, where: Callable[[int], list[str]]) -> None:
    """Raises FloatingPointError if a loss of the steps up to `number` is no number, naming the step and what it saw."""
    for step, values in enumerate(metrics, number - len(metrics) + 1):
        if not np.isfinite(values["loss"]):
            seen = ", ".join(where(step)[:20])
            raise FloatingPointError(f"the loss of step {step} is {float(values['loss'])}; it was made from {seen}")


def export(recipe: Recipe, model: QwenVL, output: Path, vocabulary: Path) -> Path:
    """Writes the model as a Hugging Face folder `output/model-STEPS`, with its vocabulary and generation settings."""
    if recipe.start is None:
        generation = {"chat_format": "chatml", "do_sample": False, "max_new_tokens": 256, "max_window_size": 1536}
        small = SmallFiles(tokenizer_file=vocabulary, tokenizer_config=None, generation_config=generation)
    else:
        small = small_files(locate(recipe.start))
    folder = output / f"model-{recipe.steps}"
    if folder.exists():
        return folder
    model = jax.tree.map(lambda x: x.astype(recipe.export_dtype), model)
    save_model(model, folder, **small)
    return folder


def export_adapter(recipe: Recipe, model: QwenVL, output: Path) -> Path:
    """Writes the adapter in PEFT's format, `output/adapter-STEPS`."""
    folder = output / f"adapter-{recipe.steps}"
    if not folder.exists():
        save_adapter(model, folder, lora_recipe(recipe), base=recipe.start)
    return folder


# What may change between two starts of one run: where it runs and how it tells of it, but not what it computes.
CIRCUMSTANCES = ("output", "mesh", "hosts", "workers", "log_every", "keep")


def _remember_recipe(recipe: Recipe, output: Path) -> None:
    """Writes the recipe into the run's folder, or refuses to go on with a run that another recipe began."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    path = output / "recipe.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        keys = sorted((values.keys() | before.keys()) - set(CIRCUMSTANCES))
        other = next((key for key in keys if before.get(key) != values.get(key)), None)
        if other is not None:
            raise UserError(
                f"{path} is of another recipe: {other} was {before.get(other)!r} and is {values.get(other)!r}; "
                f"give --output another folder, or remove {output} to begin again"
            )
    if jax.process_index() == 0:
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
