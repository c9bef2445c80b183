"""Training records to batches of fixed shape: measured, planned, then made one by one, by number.

A batch is a pure function of (recipe, records, number), so the number of batches done is all the state that the data
has. Several processes share each batch: every one makes its own rows and its own part of the pictures.
"""

import dataclasses
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.data.feature_cache import FeatureCache
from qwenvl_jax.data.measure import AllRecords, Measures, measure
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.pairs import measure_pairs, pair_tokens
from qwenvl_jax.data.pipeline import ahead
from qwenvl_jax.data.plan import BUCKET_STEP, BatchShape, Plan, make_plan, picture_slots
from qwenvl_jax.processing.images import preprocess
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED, Segment

SHOWN = 5  # bad records that an error names


@dataclasses.dataclass(frozen=True)
class BatchRecipe:
    """How records become batches."""

    max_length: int = 2048  # tokens of a row
    packing: bool = True  # several records in a row; else one, and records of like length share a batch
    answers_only: bool = (
        False  # learn answers and their <|im_end|> alone; else also what delimits turns, as the original does
    )
    too_long: Literal["cut", "skip"] = "cut"  # longer records lose text after the last picture, or are left out
    bad_records: Literal["stop", "skip"] = "stop"  # a mistake ends the run before it begins, or the record is left out
    pictures: int | None = None  # picture slots of a batch; None: a few more than an average batch needs

    def __post_init__(self):
        if self.max_length < 1:
            raise UserError(f"max_length is {self.max_length}; it must be at least 1")
        if self.pictures is not None and self.pictures < 0:
            raise UserError(f"pictures is {self.pictures}; it must be 0 or more, or left out")


class RecordBatches:
    """A random-access source of batches of records, as many as `steps` or as `epochs` passes over the records need.

    mixture: the records and their order; rows: of a batch, over all processes; process: which of `processes` this is;
    measures: where they are known already, else `workers` processes make them, and the file `cache` remembers them;
    features: where those of all pictures are cached, batches hold them in place of the pixels; pairs: whether a record
    is a chosen and a rejected answer (`pairs.py`), which is never cut, and left out where it is too long.
    `len()` is the number of batches; `longest`, the most tokens of a record, is static for
    `nn.row_attention.PackedRows`; `skipped` says of each record left out why, and `cut` counts those that lose text.
    Raises UserError when records are bad (unless told to skip them), none is left, or rows or picture slots do not
    divide among the processes.
    """

    def __init__(
        self,
        recipe: BatchRecipe,
        mixture: Mixture,
        processor: Processor,
        rows: int,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        process: int = 0,
        processes: int = 1,
        measures: Measures | None = None,
        features: FeatureCache | None = None,
        cache: Path | None = None,
        workers: int = 0,
        pairs: bool = False,
    ):
        recipe = dataclasses.replace(recipe, too_long="skip") if pairs else recipe
        self.recipe, self.processor, self.features, self.pairs = recipe, processor, features, pairs
        self.source = AllRecords(mixture.sources)
        if (steps is None) == (epochs is None):
            raise UserError("give either steps or epochs")
        self.process, self.processes = process, processes
        measures = measures or (measure_pairs if pairs else measure)(
            self.source, processor, cache=cache, workers=workers
        )
        if measures.problems and recipe.bad_records == "stop":
            raise UserError(_bad_records(measures.problems))
        self.measured, self.pictures = measures.tokens, measures.pictures
        self._reasons = _left_out(recipe, measures)
        usable = np.array([index not in self._reasons for index in range(len(self.source))])
        if not usable.any():
            first = f"; the first: {self.skipped[0]}" if self._reasons else ""
            raise UserError(f"none of the {len(usable)} records can be trained on{first}")
        self.tokens = np.where(usable, np.minimum(measures.tokens, recipe.max_length), 0)
        self.cut = int(np.sum(measures.tokens[usable] > recipe.max_length))
        self.longest = int(self.tokens.max())
        slots = recipe.pictures
        if slots is None:
            known = self.tokens[usable], self.pictures[usable]
            slots = picture_slots(*known, rows, recipe.max_length, recipe.packing)
        if not self.pictures[usable].any():
            slots = 0
        for name, value in (("rows", rows), ("picture slots", slots)):
            if value % processes:
                raise UserError(f"a batch of {value} {name} does not divide among {processes} processes")
        self.shape = BatchShape(rows, recipe.max_length, slots)
        passes = (order[usable[order]] for order in self.source.passes(mixture))
        self.plan = make_plan(
            itertools.islice(passes, epochs),
            self.tokens,
            self.pictures,
            self.shape,
            packing=recipe.packing,
            seed=mixture.seed,
            batches=steps,
        )
        self.row_records = int(np.diff(self.plan.row_ends).max())  # the most records of a row
        self.row_targets = _row_targets(self.plan, np.minimum(measures.trained, self.tokens))

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def skipped(self) -> list[str]:
        """Of each record that is left out, its place and why."""
        return [
            reason if bad else f"{self.source[i].where}: {reason}" for i, (bad, reason) in sorted(self._reasons.items())
        ]

    @property
    def shortened(self) -> Iterator[str]:
        """Of each record that loses text, its place and how much."""
        for index in np.flatnonzero((self.tokens > 0) & (self.measured > self.tokens)).tolist():
            lost = self.measured[index] - self.tokens[index]
            yield f"{self.source[index].where}: loses {lost} of {self.measured[index]} tokens"

    def before(self, number: int) -> int:
        """How many records the first `number` batches have, over all processes."""
        return int(self.plan.row_ends[self.plan.batch_ends[number]])

    def counts(self, number: int) -> dict[str, float]:
        """Of batch `number`, over all processes: records, pictures, tokens, and the shares of padding of both."""
        length, rows = self.plan[number]
        records = np.concatenate(rows)
        tokens, pictures = int(self.tokens[records].sum()), int(self.pictures[records].sum())
        return {
            "records": len(records),
            "tokens": tokens,
            "pictures": pictures,
            "padding": 1 - tokens / (self.shape.rows * length),
            "picture_padding": 1 - pictures / self.shape.pictures if self.shape.pictures else 0.0,
        }

    def where(self, number: int) -> list[str]:
        """The places ("file:line") of the records of batch `number`, over all processes, row by row."""
        return [self.source[int(record)].where for row in self.plan[number][1] for record in row]

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """This process's share of a batch: B rows of T tokens and I pictures.

        int32 [B, T]: ids; slots (rows of the features of all processes' pictures, flattened; -1 at text); positions,
        which restart in each record; and group, the number of a record in its row from 1, 0 for padding. int32 [B, K]
        with K <= T, the same for all batches of one T: targets, the trained tokens of a row, then IGNORED; and
        target_positions, of the token that predicts each. float32 [I, 3, S, S]: pixels, zeros in slots without a
        picture; absent where no record has one. Where features are cached, they take their place as features [I, Q,
        D], in the model's dtype.

        Pairs also have branch int32 [B, T] (`nn.row_attention.PackedRows`); target_answer int32 [B, K], the answer that
        a target is of, 2 m for the chosen one of the row's record m = 0, 1, ... and 2 m + 1 for the rejected one; and
        record int32 [B, M], the index of record m, -1 where a row has fewer.
        """
        length, rows = self.plan[number]
        own_rows, own_pictures = self._share(self.shape.rows), self._share(self.shape.pictures)
        batch = _empty_rows(len(own_rows), length, self.row_targets[length])
        if self.pairs:
            batch |= {"branch": np.zeros_like(batch["ids"]), "target_answer": np.zeros_like(batch["targets"])}
            batch["record"] = np.full((len(own_rows), self.row_records), -1, np.int32)
        shown_as = self._empty_pictures(len(own_pictures))
        seen = 0  # pictures before a record
        for row, records in enumerate(rows):
            place = trained = 0
            for group, record in enumerate(records.tolist(), start=1):
                shown = range(seen, seen + int(self.pictures[record]))
                seen = shown.stop
                here = [picture for picture in shown if picture in own_pictures]
                if row not in own_rows and not here:
                    continue
                tokens, labels, branch, pictures = self._read(record)
                for picture in here:
                    shown_as[picture - own_pictures.start] = self._see(pictures[picture - shown.start])
                if row in own_rows:
                    views = {name: batch[name][row - own_rows.start] for name in batch}
                    first_slot = shown.start * self.processor.config.visual.n_queries
                    trained += _write(views, tokens, labels, branch, group, place, trained, first_slot)
                    place += len(tokens)
                    if self.pairs:
                        views["record"][group - 1] = record
        if self.shape.pictures:
            batch["pixels" if self.features is None else "features"] = shown_as
        return batch

    def _empty_pictures(self, count: int) -> np.ndarray:
        vision = self.processor.config.visual
        if self.features is not None:
            return np.zeros((count, *self.features.shape), self.features.dtype)
        return np.zeros((count, 3, vision.image_size, vision.image_size), np.float32)

    def _see(self, picture: Image.Image) -> np.ndarray:
        """What the model gets of a picture: its features [Q, D] where they are cached, else its pixels [3, S, S]."""
        if self.features is not None:
            return self.features.read(picture)
        return preprocess([picture], self.processor.config.visual.image_size)[0]

    def _share(self, count: int) -> range:
        """This process's part of `count` things."""
        size = count // self.processes
        return range(self.process * size, (self.process + 1) * size)

    def _read(self, index: int) -> tuple[Segment, np.ndarray, np.ndarray, list[Image.Image]]:
        """Tokens, labels and branches of a record, cut to the row, and its pictures."""
        record = self.source[index]
        try:
            if self.pairs and record.rejected is not None:
                tokens, labels, branch, pictures = pair_tokens(record.messages, record.rejected, self.processor)
            else:
                tokens, labels, pictures = self.processor.training_tokens(record.messages, self.recipe.answers_only)
                branch = np.zeros_like(labels)
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None
        if (len(tokens), len(pictures)) != (self.measured[index], self.pictures[index]):
            raise UserError(f"{record.where}: has changed since the run began; start again from the same records")
        most = self.recipe.max_length
        return Segment(tokens.ids[:most], tokens.slots[:most]), labels[:most], branch[:most], pictures


def record_batches(
    batches: RecordBatches, *, first: int = 0, stop: int | None = None, workers: int = 1
) -> Generator[dict[str, np.ndarray]]:
    """The batches from number `first` on, up to `stop`, in order, made ahead by `workers` processes.

    Without workers they are made in this one, when asked for.
    They are the same for any number of workers, so a run resumes with `first` as the number of batches done.
    """
    return ahead(batches, first=first, stop=stop, workers=workers)


def _empty_rows(rows: int, length: int, targets: int) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((rows, length), np.int32) for name in ("ids", "positions", "group")}
    batch["slots"] = np.full((rows, length), -1, np.int32)
    batch["target_positions"] = np.zeros((rows, targets), np.int32)
    batch["targets"] = np.full((rows, targets), IGNORED, np.int32)
    return batch


def _row_targets(plan: Plan, trained: np.ndarray) -> dict[int, int]:
    """For each length of row in the plan, the places for targets that its fullest row needs, rounded up.

    trained int [R]: the most targets of each record. Fewer places than tokens are fewer rows of logits, each as wide as
    the vocabulary.
    """
    needed = np.add.reduceat(trained[plan.records], plan.row_ends[:-1])
    lengths = np.repeat(plan.lengths, np.diff(plan.batch_ends))  # of each row
    places = {length: int(needed[lengths == length].max()) for length in np.unique(lengths).tolist()}
    return {length: min(length, -(-most // BUCKET_STEP) * BUCKET_STEP) for length, most in places.items()}


def _write(
    row: dict[str, np.ndarray],
    tokens: Segment,
    labels: np.ndarray,
    branch: np.ndarray,
    group: int,
    start: int,
    trained: int,
    first_slot: int,
) -> int:
    """Writes a record into a row at `start`, its targets behind the `trained` that are there; returns how many."""
    ids, slots = tokens.arrays()
    place = slice(start, start + len(ids))
    row["ids"][place], row["group"][place] = ids, group
    number, own, shared = np.arange(len(ids)), np.searchsorted(branch, branch), int(np.sum(branch == 0))
    row["positions"][place] = np.where(branch > 0, shared + number - own, number)
    row["slots"][place] = np.where(slots >= 0, slots + first_slot, -1)
    predicted = 1 + np.flatnonzero(labels[1:] != IGNORED)  # nothing stands before a record's first token
    before = np.where((branch > 0) & (number == own), shared, number) - 1  # each branch begins behind what is shared
    places = slice(trained, trained + len(predicted))
    row["targets"][places], row["target_positions"][places] = labels[predicted], start + before[predicted]
    if "branch" in row:
        row["branch"][place], row["target_answer"][places] = branch, 2 * (group - 1) + branch[predicted] - 1
    return len(predicted)


def _left_out(recipe: BatchRecipe, measures: Measures) -> dict[int, tuple[bool, str]]:
    """Records that are not trained on, by index: whether they are bad, and why."""
    reasons = {index: (True, problem) for index, problem in measures.problems.items()}
    for index in np.flatnonzero(measures.tokens > recipe.max_length).tolist():
        if recipe.too_long == "skip":
            reasons[index] = (False, f"has {measures.tokens[index]} tokens, more than max_length {recipe.max_length}")
        elif measures.needed[index] > recipe.max_length:
            least = f"it needs {measures.needed[index]}"
            reasons[index] = (False, f"max_length {recipe.max_length} cuts a picture or all of the answers; {least}")
    if recipe.pictures is not None:
        for index in np.flatnonzero(measures.pictures > recipe.pictures).tolist():
            reason = f"has {measures.pictures[index]} pictures, more than the {recipe.pictures} of a batch"
            reasons.setdefault(index, (False, reason))
    return reasons


def _bad_records(problems: dict[int, str]) -> str:
    shown = "; ".join(problems[index] for index in sorted(problems)[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} records cannot be trained on (bad_records: skip leaves them out): {shown}{more}"
