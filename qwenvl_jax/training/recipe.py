"""Recipes: what a training run is, as a YAML file and command-line overrides, typed.

`python train.py configs/tiny.yaml --optimizer.learning-rate 0.005`. A misspelt field is refused with the nearest one.
"""

import dataclasses
import difflib
import itertools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
import yaml

from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.data.record_batches import BatchRecipe
from qwenvl_jax.data.scene_rows import SceneRecipe
from qwenvl_jax.hosts import HostsRecipe
from qwenvl_jax.models.qwen_vl import Remat
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.training.optimizer import OptimizerRecipe
from qwenvl_jax.training.parts import Parts
from qwenvl_jax.training.placement import MeshRecipe
from qwenvl_jax.training.planned_devices import PlanRecipe
from qwenvl_jax.training.preference import DpoRecipe


@dataclasses.dataclass(frozen=True)
class NewModel:
    """The shape of a model that starts from random weights; see `QwenVLConfig` and `VisionConfig` for the fields."""

    vocabulary: str | None = None  # a qwen.tiktoken file; None: that of the tiny model, which fits its scenes
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 768
    initializer_range: float = 0.08
    seq_length: int = 2048
    image_size: int = 96
    patch_size: int = 12
    vision_width: int = 96
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp_ratio: float = 4.0
    n_queries: int = 64
    # Resampler queries begin at their own part of the picture; see `auxiliary.start_local`.
    start_local: bool = True

    def config(self, image_start_id: int) -> QwenVLConfig:
        return QwenVLConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            kv_channels=self.hidden_size // self.heads,
            intermediate_size=self.intermediate_size,
            initializer_range=self.initializer_range,
            seq_length=self.seq_length,
            max_position_embeddings=4 * self.seq_length,
            visual=VisionConfig(
                image_size=self.image_size,
                patch_size=self.patch_size,
                width=self.vision_width,
                layers=self.vision_layers,
                heads=self.vision_heads,
                mlp_ratio=self.vision_mlp_ratio,
                output_dim=self.hidden_size,
                n_queries=self.n_queries,
                image_start_id=image_start_id,
            ),
        )


@dataclasses.dataclass(frozen=True)
class AuxiliaryRecipe:
    """The head that names what covers each cell of a picture; its weight falls to `floor` at `until` of the run."""

    alone_steps: int = 0  # the first steps train the vision tower by this head alone, in place of CLIP's weights
    weight: float = 1.0
    floor: float = 0.3
    until: float = 0.5


@dataclasses.dataclass(frozen=True)
class RecordsRecipe:
    """Which records are learnt, in which share; see docs/data.md for the formats."""

    files: tuple[str, ...] = ()  # files, folders or tfds:NAME
    weights: tuple[float, ...] | None = None  # of each, in the mixture; None: every record once an epoch
    validation: tuple[str, ...] = ()
    image_root: str | None = None  # where relative picture paths start; None: the folder of their file
    cache_features: bool = False  # encode each picture once, before the first step; for a frozen vision tower
    epochs: int | None = None  # passes over the records, in place of `steps`; None: as many as those need
    template: typing.Literal["chat", "raw"] = (
        "chat"  # ChatML, or bare text and pictures as base models are pre-trained on
    )
    batches: BatchRecipe = dataclasses.field(default_factory=BatchRecipe)

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"records.epochs is {self.epochs}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class TasksRecipe:
    """Datasets of docs/evaluation.md that the model answers at evaluations of the run."""

    tasks: tuple[str, ...] = ()  # by the names that eval/*.py have for them
    data: str = "data"  # folder of their files
    limit: int | None = 200  # samples of each, the first; None: all
    every: int = 1  # at each evaluation, or at every so manieth and the last

    def __post_init__(self):
        for name in ("limit", "every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"evaluate.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run."""

    output: str = "runs/run"  # folder of checkpoints, logs, curve and the exported model
    start: str | None = None  # checkpoint folder to go on from; None: a new model of the shape below
    image_size: int | None = None  # pixels, of the pictures as `start` shall see them; None: as it did
    lora: LoraRecipe | None = None  # train an adapter beside `start`, which stays as it is
    quantize: typing.Literal["int8", "int4", "nf4"] | None = None  # hold the weights under the adapter so (QLoRA: nf4)
    new_model: NewModel = dataclasses.field(default_factory=NewModel)
    data: SceneRecipe = dataclasses.field(default_factory=SceneRecipe)  # drawn scenes, where `records` are not given
    records: RecordsRecipe | None = None
    dpo: DpoRecipe | None = None  # learn which of two answers is liked more, from records with a rejected one
    optimizer: OptimizerRecipe = dataclasses.field(default_factory=OptimizerRecipe)
    auxiliary: AuxiliaryRecipe | None = None
    parts: Parts = dataclasses.field(default_factory=Parts)
    mesh: MeshRecipe = dataclasses.field(default_factory=MeshRecipe)
    hosts: HostsRecipe = dataclasses.field(default_factory=HostsRecipe)
    steps: int = 1000
    batch_size: int = 24  # sequences of a step, on all devices together
    accumulate: int = 1  # smaller batches, one after the other, whose gradients make up a step
    # What is computed in. The trained parameters stay float32 (masters) unless `masters` is off; frozen ones never do.
    dtype: typing.Literal["float32", "bfloat16"] = "float32"
    masters: bool = True
    remat: Remat = "none"  # what the backward pass computes again to save memory: whole layers, or all but products
    seed: int = 0
    workers: int = 1  # processes that draw and tokenise
    log_every: int = 50
    evaluate_every: int = 500
    evaluate_batches: int = 8
    evaluate_samples: int = 8  # validation questions that the model answers at each evaluation; 0: none
    evaluate: TasksRecipe = dataclasses.field(default_factory=TasksRecipe)  # datasets it answers beside them
    peak_tflops: float | None = None  # of one device, for MFU; None: the data sheet's, for devices known to flops.py
    save_every: int = 500
    keep: int = 2  # checkpoints
    export_dtype: typing.Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "log_every", "evaluate_every", "save_every", "keep", "workers")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.image_size is not None and self.start is None:
            raise UserError("image_size goes with a checkpoint; a new model has new_model.image_size")
        if self.evaluate_samples < 0:
            raise UserError(f"evaluate_samples is {self.evaluate_samples}; it must be at least 0")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"peak_tflops is {self.peak_tflops}; it must be above 0")
        if (self.lora is not None or self.quantize is not None) and self.start is None:
            raise UserError("lora and quantize go with a checkpoint; name one with start")
        if self.quantize is not None and self.lora is None:
            raise UserError("quantize: quantised weights are not trained; add lora, for an adapter beside them")
        if self.dpo is not None and (self.records is None or self.start is None):
            raise UserError("dpo goes with a checkpoint and records; name them with start and records.files")
        if self.dpo is not None and self.records is not None and self.records.template == "raw":
            raise UserError("records.template is 'raw'; dpo compares answers in a chat, leave it out")
        if self.records is not None and self.auxiliary is not None:
            raise UserError("auxiliary: its labels are known of drawn scenes alone; leave it out with records")
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} does not divide into accumulate {self.accumulate} parts")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file. Raises UserError naming the file and the field."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        near = difflib.get_close_matches(str(path), map(str, Path(path).parent.glob("*.yaml")))
        raise UserError(f"{path}: {error.strerror}" + (f"; did you mean {near[0]}?" if near else "")) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return _build(Recipe, raw or {}, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_arguments(arguments: Sequence[str]) -> Recipe:
    """The recipe of a command line: a YAML file, then overrides such as `--data.seed 1`. A wrong flag exits with 2."""
    asks_help = arguments[:1] in (["-h"], ["--help"])
    if not asks_help and (not arguments or arguments[0].startswith("-")):
        raise UserError("name a recipe first, for example: python train.py configs/tiny.yaml --steps 100")
    recipe = Recipe() if asks_help else read_recipe(arguments[0])
    program = f"{Path(sys.argv[0]).name} {'RECIPE.yaml' if asks_help else arguments[0]}"
    flags = list(arguments if asks_help else arguments[1:])
    if recipe.records is not None and any(flag.split("=")[0] == "--steps" for flag in flags):
        # Who gives a number of steps does not mean the recipe's passes over the records, which would decide.
        recipe = dataclasses.replace(recipe, records=dataclasses.replace(recipe.records, epochs=None))
    plain = (tyro.conf.AvoidSubcommands,)  # a part that a recipe has or has not is fields, no command of its own
    return tyro.cli(Recipe, args=flags, default=recipe, prog=program, config=plain)


def parse_plan(arguments: Sequence[str]) -> tuple[list[str], PlanRecipe | None]:
    """The arguments without `--plan` and `--plan.FIELD VALUE`, and what these say; None where there are none."""
    rest: list[str] = []
    flags: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("--plan."):
            flags.append(argument)
            flags += [] if "=" in argument else itertools.islice(remaining, 1)
        elif argument != "--plan":
            rest.append(argument)
    if len(rest) == len(arguments):
        return rest, None
    flags += {"-h", "--help"} & set(rest)  # with --plan, about it
    return rest, tyro.cli(_PlanFlags, args=flags, prog=f"{Path(sys.argv[0]).name} RECIPE.yaml --plan").plan


@dataclasses.dataclass(frozen=True)
class _PlanFlags:
    """Compiles the recipe's step for machines that are not there, and says what each of them would have to hold."""

    plan: PlanRecipe = dataclasses.field(default_factory=PlanRecipe)


# What may change between two starts of one run: where it runs and how it tells of it, but not what it computes.
CIRCUMSTANCES = ("output", "mesh", "hosts", "workers", "log_every", "keep", "peak_tflops")
CIRCUMSTANCES += ("evaluate_samples", "evaluate")


def remember_recipe(recipe: Recipe, output: Path) -> None:
    """Writes the recipe into the run's folder, which it makes, or refuses to go on with a run of another recipe."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output {output}: {error.strerror}; give a folder that can be made and written") from None
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
        partial = output / ".recipe.yaml.partial"  # cut off by a full disk, it would be another recipe
        partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        partial.replace(path)


def _build(kind: type, raw: Any, where: str):
    """A dataclass from a YAML mapping, checked field by field."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where or 'the file'} must be a mapping of fields, not {raw!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in raw.items():
        field = f"{where}.{name}" if where else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
            raise UserError(f"unknown field {field}; {hint}")
        values[name] = _value(hints[name], value, field)
    return kind(**values)


def _value(hint: Any, value: Any, field: str) -> Any:
    """A YAML value as its field's type, or UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, field)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, field)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{field} is {value!r}; use one of {', '.join(map(str, arguments))}")
    if origin is tuple and isinstance(value, list):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(_value(a, v, f"{field}[{i}]") for i, (a, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(arguments[1], item, f"{field}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, str):  # YAML reads 1e-5 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{field} is {value!r}; expected {getattr(hint, '__name__', str(hint))}")
