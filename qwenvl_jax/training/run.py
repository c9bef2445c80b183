"""A training run from a recipe: build, resume, step, watch, save, export. `train.py` calls `train`."""

import contextlib
import dataclasses
import json
import signal
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml
from jax.experimental import multihost_utils

from qwenvl_jax.checkpoints.folder import SmallFiles, locate, small_files
from qwenvl_jax.checkpoints.huggingface import save_model
from qwenvl_jax.checkpoints.peft import save_adapter
from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.training.build import auxiliary_schedule, build_modules, divide, lora_recipe, rate_ratios
from qwenvl_jax.training.checkpoints import Checkpoints
from qwenvl_jax.training.data import open_data
from qwenvl_jax.training.evaluation import evaluate
from qwenvl_jax.training.flops import peak_flops, step_cost
from qwenvl_jax.training.hosts import connect
from qwenvl_jax.training.log import RunLog
from qwenvl_jax.training.meter import Meter, count
from qwenvl_jax.training.optimizer import make_optimizer, schedule
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.samples import Samples
from qwenvl_jax.training.step import TrainState, make_evaluation_step, make_train_step


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
    when the folder holds a run of another recipe, and FloatingPointError naming the step when loss or gradient are no
    longer numbers.
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
    weight = auxiliary_schedule(recipe)
    dropout = jax.random.key(recipe.seed) if recipe.lora is not None and recipe.lora.dropout > 0 else None
    make_step = partial(make_train_step, rebuild, optimizer, weight, dtype=dtype)
    step = jax.jit(make_step(remat=recipe.remat, hidden_of=data.forward, dropout=dropout), donate_argnums=0)
    vision_step = jax.jit(make_step(vision_only=True), donate_argnums=0)
    alone = 0 if recipe.auxiliary is None else recipe.auxiliary.alone_steps
    evaluation_step = jax.jit(
        make_evaluation_step(rebuild, dtype=dtype, hidden_of=data.forward), out_shardings=placement.everywhere
    )

    rate = schedule(recipe.optimizer, recipe.optimizer.learning_rate, recipe.steps)

    samples = Samples(data.asked if jax.process_count() == 1 else [], data.processor, output / "samples")
    meter = Meter(step_cost(config, params), _peak(recipe, placement))
    counted = partial(count, queries=config.visual.n_queries)

    with (
        contextlib.closing(Checkpoints(output / "checkpoints", recipe.keep)) as checkpoints,
        contextlib.closing(data.batches(checkpoints.latest or 0)) as batches,
        RunLog(output, recipe.steps, checkpoints.latest or 0, params | frozen, set(params), data.left_out) as log,
        StopRequest() as stop,
    ):
        for note in data.notes:
            log.console.print(note, soft_wrap=True)
        if len(samples.asked) < len(data.asked):
            log.console.print("no samples are answered: that is for a single host")
        if checkpoints.latest is not None:
            state = checkpoints.load(state)
        first = int(state.step)
        meter.restart()
        for number in range(first + 1, recipe.steps + 1):
            began = time.perf_counter()
            batch = placement.batches(next(batches))
            waited = time.perf_counter() - began
            state, metrics = (vision_step if number <= alone else step)(state, frozen, batch)
            meter.add(metrics | counted(batch, words=number > alone), waited)
            last, stopping = number == recipe.steps, stop.at(number)
            logs = number % recipe.log_every == 0 or last or stopping
            evaluates = number % recipe.evaluate_every == 0 or last
            saves = number % recipe.save_every == 0 or last or stopping
            if logs or evaluates or saves:
                meter.check(number, data.where, checkpoints.latest)
            if logs:
                log.steps(number, meter.row() | {"learning_rate": float(rate(number)), "records": data.done(number)})
            result = {}
            if evaluates:
                with meter.paused():
                    if data.validation:
                        result = evaluate(partial(evaluation_step, state.params, frozen), data.validation)
                    if samples.asked:
                        now = {name: p if dtype is None else p.astype(dtype) for name, p in state.params.items()}
                        samples.answer(rebuild(now | frozen)["model"], number)
                        del now
                    log.evaluation(number, result)
            if saves:
                checkpoints.save(state, number, result.get("loss"))
            if stopping and not last:
                return None
    model = rebuild(state.params | frozen)["model"]
    return export(recipe, model, output, vocabulary) if recipe.lora is None else export_adapter(recipe, model, output)


def _peak(recipe: Recipe, placement: Placement) -> float | None:
    """FLOP/s of all devices of the run, None where that is not known."""
    kind = placement.mesh.devices.flat[0].device_kind
    one = peak_flops(kind) if recipe.peak_tflops is None else 1e12 * recipe.peak_tflops
    return None if one is None else one * placement.mesh.size


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
CIRCUMSTANCES = ("output", "mesh", "hosts", "workers", "log_every", "keep", "evaluate_samples", "peak_tflops")


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
