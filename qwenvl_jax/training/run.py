"""A training run from a recipe: build, resume, step, watch, save, export. `train.py` calls `train`."""

import contextlib
import dataclasses
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from qwenvl_jax.hosts import StopRequest, connect
from qwenvl_jax.sharding import on_mesh
from qwenvl_jax.training.build import build_modules, build_step, divide, objective_of, rate_ratios
from qwenvl_jax.training.checkpoints import Checkpoints
from qwenvl_jax.training.data import open_data
from qwenvl_jax.training.export import export, export_adapter
from qwenvl_jax.training.features import open_cache
from qwenvl_jax.training.flops import peak_of_run, step_cost
from qwenvl_jax.training.log import RunLog
from qwenvl_jax.training.meter import Meter, count
from qwenvl_jax.training.optimizer import make_optimizer, schedule
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.recipe import Recipe, remember_recipe
from qwenvl_jax.training.reference import examine_reference, with_reference
from qwenvl_jax.training.samples import Samples
from qwenvl_jax.training.step import TrainState, make_evaluation_step
from qwenvl_jax.training.tasks import Tasks, open_tasks


def train(recipe: Recipe) -> Path | None:
    """Runs the recipe to its end, from the newest checkpoint in its output folder if there is one.

    Returns the folder of the exported model, or None after SIGTERM, when a checkpoint has been saved. Raises UserError
    when the folder holds a run of another recipe, and FloatingPointError naming the step when loss or gradient are no
    longer numbers.
    """
    connect(recipe.hosts)
    output = Path(recipe.output)
    asked = open_tasks(recipe)
    remember_recipe(recipe, output)
    placement = Placement(recipe.mesh, recipe.batch_size // recipe.accumulate)
    modules, config, vocabulary = build_modules(recipe, placement)
    params, frozen, rebuild = divide(modules, recipe, placement)
    cache = open_cache(recipe, rebuild(params | frozen)["model"], set(params))
    data = open_data(recipe, config, vocabulary, placement, cache)
    recipe = dataclasses.replace(recipe, steps=data.steps)
    optimizer = make_optimizer(recipe.optimizer, params, recipe.steps, recipe.parts, rate_ratios(modules, recipe))
    del modules
    start = jax.device_put(jnp.zeros((), jnp.int32), placement.everywhere)
    state = TrainState(start, params, placement.optimizer(optimizer, params))
    dtype = recipe.dtype if recipe.dtype != "float32" else None
    objective = objective_of(recipe)
    step = build_step(recipe, placement.mesh, rebuild, optimizer, data.forward)
    vision_step = build_step(recipe, placement.mesh, rebuild, optimizer, data.forward, vision_only=True)
    alone = 0 if recipe.auxiliary is None else recipe.auxiliary.alone_steps

    def evaluating(examine):
        made = make_evaluation_step(rebuild, dtype=dtype, hidden_of=data.forward, examine=examine)
        return jax.jit(on_mesh(made, placement.mesh), out_shardings=placement.everywhere)

    evaluation_step = evaluating(objective.examine)
    rate = schedule(recipe.optimizer, recipe.optimizer.learning_rate, recipe.steps)

    checkpoints = Checkpoints(output / "checkpoints", recipe.keep)
    if recipe.dpo is not None:
        of_start = partial(evaluating(examine_reference), params, frozen)
        data = with_reference(data, of_start, placement, output / "reference.npy", checkpoints.latest is not None)
    samples = Samples(data.asked if jax.process_count() == 1 else [], data.processor, output / "samples")
    tasks = Tasks(asked if jax.process_count() == 1 else [], output / "evaluation")
    meter = Meter(step_cost(config, params), peak_of_run(recipe.peak_tflops, placement.mesh))
    counted = partial(count, queries=config.visual.n_queries)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(data.batches(checkpoints.latest or 0)) as batches,
        RunLog(output, recipe.steps, checkpoints.latest or 0, params | frozen, set(params), data.left_out) as log,
        StopRequest() as stop,
    ):
        for note in data.notes:
            log.console.print(note, soft_wrap=True)
        if len(samples.asked) < len(data.asked) or len(tasks.asked) < len(asked):
            log.console.print("no samples are answered, and no tasks: that is for a single host")
        if checkpoints.latest is not None:
            state = checkpoints.load(state)
            params.clear()  # those of the start, or their memory would be held for the whole run
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
                        result = objective.evaluate(partial(evaluation_step, state.params, frozen), data.validation)
                    scores = {}
                    asks = tasks.asked and (number % (recipe.evaluate_every * recipe.evaluate.every) == 0 or last)
                    if samples.asked or asks:
                        now = {name: p if dtype is None else p.astype(dtype) for name, p in state.params.items()}
                        model = rebuild(now | frozen)["model"]
                        samples.answer(model, number)
                        if asks:
                            with samples.loaded(model) as vlm:
                                scores = tasks.answer(vlm, number, log.console.print)
                        del now, model
                    log.evaluation(number, result, scores)
            if saves:
                checkpoints.save(state, number, result.get("loss"))
            if stopping and not last:
                return None
    model = rebuild(state.params | frozen)["model"]
    folder = output / f"{'model' if recipe.lora is None else 'adapter'}-{recipe.steps}"
    if not folder.exists():
        export(recipe, model, folder, vocabulary) if recipe.lora is None else export_adapter(recipe, model, folder)
    return folder
