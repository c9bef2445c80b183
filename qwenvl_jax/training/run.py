"""A training run from a recipe: build, resume, step, watch, save, export. `train.py` calls `train`."""

import dataclasses
import importlib.resources
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from orbax.checkpoint import v1 as ocp

from qwenvl_jax.checkpoints.folder import VOCABULARY, SmallFiles, locate, read_config, small_files
from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data.pipeline import batches
from qwenvl_jax.data.scene_rows import SceneRows
from qwenvl_jax.data.scenes import COLORS, GLYPHS, SHAPES, SIZES
from qwenvl_jax.models.quantised import quantised_linears
from qwenvl_jax.models.qwen_vl import QwenVL, unstack
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.auxiliary import CellHead, CellTargets, start_local
from qwenvl_jax.training.evaluation import device_batch, evaluate, validation_batches
from qwenvl_jax.training.log import RunLog
from qwenvl_jax.training.optimizer import make_optimizer, schedule
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.step import TrainState, make_evaluation_step, make_train_step, named_parameters


def build_modules(recipe: Recipe) -> tuple[dict[str, nnx.Module], QwenVLConfig, Path]:
    """The modules to train ({"model", and "auxiliary" if wanted}), the configuration and the vocabulary file."""
    if recipe.start is None:
        shipped = importlib.resources.files("qwenvl_jax") / "assets" / "tiny" / VOCABULARY
        vocabulary = Path(recipe.new_model.vocabulary or str(shipped))
        tokenizer = Tokenizer.from_file(vocabulary, recipe.new_model.n_queries)
        config = recipe.new_model.config(tokenizer.image_start_id)
        if tokenizer.n_vocab > config.vocab_size:
            raise UserError(f"{vocabulary} needs new_model.vocab_size of at least {tokenizer.n_vocab}")
        model = QwenVL(config, rngs=nnx.Rngs(recipe.seed))
        if recipe.new_model.start_local:
            start_local(model)
    else:
        folder = locate(recipe.start)
        config, vocabulary = read_config(folder), folder / VOCABULARY
        model = load_model(folder, dtype="float32", stacked=True)
        if quantised_linears(model):
            raise UserError(f"{folder}: the weights are quantised, and these cannot be trained; start from float ones")
    # Few layers run faster one by one; a deep stack is scanned, or compiling takes minutes.
    modules: dict[str, nnx.Module] = {"model": unstack(model) if config.num_hidden_layers <= 8 else model}
    if recipe.auxiliary is not None:
        targets = CellTargets(*(1 + len(names) for names in (COLORS, SHAPES, SIZES, GLYPHS)))
        modules["auxiliary"] = CellHead(config.visual, targets, cells=recipe.data.cells, rngs=nnx.Rngs(recipe.seed + 1))
    return modules, config, vocabulary


def auxiliary_schedule(recipe: Recipe):
    """step -> weight of the auxiliary loss."""
    if recipe.auxiliary is None:
        return lambda step: 0.0
    a = recipe.auxiliary
    return lambda step: jnp.maximum(a.floor, a.weight - (a.weight - a.floor) * step / (a.until * recipe.steps))


class Checkpoints:
    """Orbax checkpoints of a run: parameters and optimizer apart, so that the first can be read alone."""

    def __init__(self, folder: Path, keep: int):
        self.checkpointer = ocp.training.Checkpointer(
            folder.absolute(), preservation_policy=ocp.training.preservation_policies.LatestN(keep)
        )

    @property
    def latest(self) -> int | None:
        return None if self.checkpointer.latest is None else self.checkpointer.latest.step

    def save(self, step: int, state: TrainState) -> None:
        parts = {"params": state.params, "optimizer": {"memory": state.optimizer, "step": state.step}}
        self.checkpointer.save_checkpointables_async(step, parts, force=True)

    def load(self, state: TrainState) -> TrainState:
        """The newest state, into the shapes and shardings of `state`."""
        parts = {"params": state.params, "optimizer": {"memory": state.optimizer, "step": state.step}}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
        loaded = self.checkpointer.load_checkpointables(self.latest, shapes)
        return TrainState(loaded["optimizer"]["step"], loaded["params"], loaded["optimizer"]["memory"])

    def close(self) -> None:
        self.checkpointer.close()


def train(recipe: Recipe) -> Path:
    """Runs the recipe to its end, from the newest checkpoint in its output folder if there is one.

    Returns the folder of the exported model. Raises UserError when the folder holds a run of another recipe, and
    FloatingPointError naming the step when the loss is no longer a number.
    """
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    _remember_recipe(recipe, output)
    modules, config, vocabulary = build_modules(recipe)
    params, rebuild = named_parameters(modules)
    optimizer = make_optimizer(recipe.optimizer, params, recipe.steps)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    train_step = make_train_step(rebuild, optimizer, auxiliary_schedule(recipe), remat=recipe.remat)
    step = jax.jit(train_step, donate_argnums=0)
    alone = 0 if recipe.auxiliary is None else recipe.auxiliary.alone_steps
    vision_step = make_train_step(rebuild, optimizer, auxiliary_schedule(recipe), vision_only=True)
    vision_step = jax.jit(vision_step, donate_argnums=0)
    evaluation_step = jax.jit(make_evaluation_step(rebuild))

    rows = SceneRows(recipe.data, str(vocabulary), config, recipe.steps, recipe.batch_size)
    validation_recipe = dataclasses.replace(recipe.data, split="val", curriculum=((0.0, 6),), two_pictures_every=0)
    validation = validation_batches(
        SceneRows(validation_recipe, str(vocabulary), config, 1, recipe.batch_size), recipe.evaluate_batches
    )
    checkpoints = Checkpoints(output / "checkpoints", recipe.keep)
    first = 0
    if checkpoints.latest is not None:
        state = checkpoints.load(state)
        first = int(state.step)
    data = batches(rows, first=first, workers=recipe.workers)

    rate = schedule(recipe.optimizer, recipe.optimizer.learning_rate, recipe.steps)
    with RunLog(output, recipe.steps, first, len(params), sum(p.size for p in params.values())) as log:
        waited, metrics = 0.0, []
        for number in range(first + 1, recipe.steps + 1):
            began = time.perf_counter()
            batch = device_batch(next(data))
            waited += time.perf_counter() - began
            state, step_metrics = (vision_step if number <= alone else step)(state, batch)
            metrics.append(step_metrics)
            if number % recipe.log_every == 0 or number == recipe.steps:
                values = {k: float(np.mean([float(m[k]) for m in metrics])) for k in metrics[0]}
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(f"the loss is {values['loss']} in the {len(metrics)} steps up to {number}")
                values |= {"learning_rate": float(rate(number)), "data_wait": waited / len(metrics)}
                log.steps(number, values, len(metrics))
                waited, metrics = 0.0, []
            if number % recipe.evaluate_every == 0 or number == recipe.steps:
                log.evaluation(number, evaluate(evaluation_step, state.params, validation))
            if number % recipe.save_every == 0 or number == recipe.steps:
                checkpoints.save(number, state)
        checkpoints.close()
    return export(recipe, rebuild(state.params)["model"], output, vocabulary)


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


def _remember_recipe(recipe: Recipe, output: Path) -> None:
    """Writes the recipe into the run's folder, or refuses to go on with a run that another recipe began."""
    text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe))), sort_keys=False, allow_unicode=True)
    path = output / "recipe.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} is of another recipe; give --output another folder, or remove {output} to begin again")
    path.write_text(text, encoding="utf-8")
