"""What a run learns from, drawn scenes or records, in the form in which the training loop takes both."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.pipeline import batches, closing
from qwenvl_jax.data.record_batches import RecordBatches, record_batches
from qwenvl_jax.data.records import open_records
from qwenvl_jax.data.scene_rows import SceneRows
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.evaluation import device_batch, validation_batches
from qwenvl_jax.training.features import PictureCache
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.recipe import Recipe
from qwenvl_jax.training.record_rows import record_hidden
from qwenvl_jax.training.samples import Asked, record_questions, scene_records
from qwenvl_jax.training.step import packed_hidden

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    batches: from a number of steps done, an iterator over this host's share of each step, arrays [A, ...] of
    `accumulate` batches; validation: batches, and what of them goes to the devices; forward: the forward pass for these
    rows; where: of a step, counted from 1, what it shows; notes: what the user should know before the first step;
    once: the batches of the first steps, as many as show every record once; done: how many records so many steps show;
    asked: validation questions whose answers are to be seen; left_out: records that are not learnt, or not whole, with
    reasons.
    """

    steps: int
    batches: Callable[[int], Generator[Batch]]
    validation: list[tuple[Batch, dict]]
    forward: Callable
    where: Callable[[int], list[str]]
    notes: list[str]
    once: Callable[[], Generator[Batch]]
    done: Callable[[int], int]
    processor: Processor
    asked: list[Asked]
    left_out: list[str]


def open_data(
    recipe: Recipe, config: QwenVLConfig, vocabulary: Path, placement: Placement, cache: PictureCache | None = None
) -> RunData:
    """The records of the recipe, or scenes where it names none. Raises UserError naming what is wrong with a record.

    cache: where records' pictures are replaced by their features; those that it lacks are encoded first.
    """
    tokenizer = Tokenizer.from_file(vocabulary, config.visual.n_queries)
    if recipe.records is None:
        return _scenes(recipe, Processor(tokenizer, config), vocabulary, placement)
    return _records(recipe, Processor(tokenizer, config, training_form=recipe.records.template), placement, cache)


def _scenes(recipe: Recipe, processor: Processor, vocabulary: Path, placement: Placement) -> RunData:
    config = processor.config
    rows = SceneRows(recipe.data, str(vocabulary), config, recipe.steps, recipe.batch_size)
    validation_recipe = dataclasses.replace(recipe.data, split="val", curriculum=((0.0, 6),), two_pictures_every=0)
    validation_rows = SceneRows(validation_recipe, str(vocabulary), config, 1, recipe.batch_size)
    validation = validation_batches(validation_rows, recipe.evaluate_batches)

    def scenes_of(step: int) -> list[str]:
        first = (step - 1) * recipe.batch_size
        return [f"{recipe.data.split} scenes of rows {first} to {first + recipe.batch_size - 1}"]

    def from_step(first: int) -> Generator[Batch]:
        drawn = batches(rows, first=first, workers=recipe.workers, splits=recipe.accumulate, share=placement.rows)
        with closing(drawn):
            yield from map(device_batch, drawn)

    return RunData(
        recipe.steps,
        from_step,
        [(batch, device_batch(batch)) for batch in validation],
        packed_hidden,
        scenes_of,
        [],
        once=partial(from_step, 0),
        done=lambda step: step * recipe.batch_size,
        processor=processor,
        asked=record_questions(scene_records(recipe.data.seed), processor, recipe.evaluate_samples),
        left_out=[],
    )


def _records(recipe: Recipe, processor: Processor, placement: Placement, cache: PictureCache | None) -> RunData:
    wanted, splits = recipe.records, recipe.accumulate
    assert wanted is not None
    share = len(placement.rows)
    shared = partial(
        RecordBatches,
        processor=processor,
        rows=placement.batch_size,
        process=placement.rows.start // share,
        processes=placement.batch_size // share,
        workers=recipe.workers,
        pairs=recipe.dpo is not None,
        features=None if cache is None else cache.features,
    )

    def mixture(files: tuple[str, ...], weights: tuple[float, ...] | None) -> Mixture:
        return Mixture([open_records(file, wanted.image_root) for file in files], weights, recipe.seed)

    steps = None if wanted.epochs else recipe.steps * splits
    records = shared(
        wanted.batches, mixture(wanted.files, wanted.weights), steps=steps, epochs=wanted.epochs, cache=_cache(recipe)
    )
    if len(records) < splits:
        raise UserError(f"records: {len(records)} batches are fewer than the {splits} of one step")
    if cache is not None:
        cache.fill(records.source, processor, recipe.workers)
    longest = records.longest
    validation: list[tuple[Batch, dict]] = []
    asked: list[Asked] = []
    if wanted.validation:
        # Packed whatever the recipe, and without its weights: every record once.
        held = shared(
            dataclasses.replace(wanted.batches, packing=True, bad_records="skip"),
            mixture(wanted.validation, None),
            epochs=1,
        )
        if cache is not None:
            cache.fill(held.source, processor, recipe.workers)
        longest = max(longest, held.longest)
        validation, asked = _held_out(held, recipe, processor, placement)
    count = len(records) // splits

    def from_step(first: int, stop: int = count) -> Generator[Batch]:
        numbers = {"first": first * splits, "stop": stop * splits}
        with contextlib.closing(record_batches(records, **numbers, workers=recipe.workers)) as made:
            for _ in range(first, stop):
                yield stacked([next(made) for _ in range(splits)])

    skipped = records.skipped
    notes = [f"left out: {reason}" for reason in skipped[:5]]
    if len(skipped) > len(notes):
        notes.append(f"left out: {len(skipped) - len(notes)} more records")
    if records.cut:
        notes.append(f"cut: {records.cut} records lose text beyond {wanted.batches.max_length} tokens")
    return RunData(
        count,
        from_step,
        validation,
        partial(record_hidden, longest=longest),
        lambda step: [place for i in range(splits) for place in records.where((step - 1) * splits + i)],
        notes,
        once=lambda: from_step(0, -(-records.plan.shown(count * splits) // splits)),
        done=lambda step: records.before(step * splits),
        processor=processor,
        asked=asked,
        left_out=[*skipped, *records.shortened],
    )


def _held_out(
    held: RecordBatches, recipe: Recipe, processor: Processor, placement: Placement
) -> tuple[list[tuple[Batch, dict]], list[Asked]]:
    """Validation batches on the mesh, and the questions of some of their records, spread over all files."""
    assert recipe.records is not None
    validation: list[tuple[Batch, dict]] = []
    for number in range(min(len(held), recipe.evaluate_batches)):
        placed = placement.batches({name: value[None] for name, value in held[number].items()})
        validation.append(({}, jax.tree.map(lambda x: x[0], placed)))
    usable = np.flatnonzero(held.tokens)
    wished = recipe.evaluate_samples if recipe.records.template == "chat" else 0  # a base model is not to be asked
    apart = usable[:: max(len(usable) // max(wished, 1), 1)]
    return validation, record_questions(map(held.source.__getitem__, apart.tolist()), processor, wished)


def _cache(recipe: Recipe) -> Path:
    """Where the numbers of tokens of the records are remembered between two starts."""
    return Path(recipe.output) / "measured"


def stacked(made: list[Batch]) -> Batch:
    """The batches of a step in one, [A, ...]; shorter rows are padded to the longest."""
    padding = {"slots": -1, "targets": -100}

    def stack(name: str) -> np.ndarray:
        values = [batch[name] for batch in made]
        if values[0].ndim == 2:  # [B, tokens] or [B, targets]
            longest = max(value.shape[1] for value in values)
            fill = padding.get(name, 0)
            values = [np.pad(v, ((0, 0), (0, longest - v.shape[1])), constant_values=fill) for v in values]
        return np.stack(values)

    return {name: stack(name) for name in made[0]}
