"""What the model that a preference run starts from says of its pairs of answers: the reference of the loss.

That model is the checkpoint, to which a fresh adapter adds nothing. The loss needs two numbers a pair of it, so they
are computed once, before the first step, and kept in a file: no second model is held beside the trained one, a step
costs what one of supervised fine-tuning does, and a run that resumes reads the very same numbers. The way is one for
adapters, for modules trained whole beside an adapter, and for whole models.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path

import jax
import numpy as np

from qwenvl_jax.training.data import Batch, RunData
from qwenvl_jax.training.placement import Placement
from qwenvl_jax.training.preference import answer_log_probs


def examine_reference(model, hidden: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Of a batch of pairs, record int32 [B, M] and its log-probabilities float32 [B, M, 2]."""
    return batch["record"], answer_log_probs(model, hidden, batch)[0]


def with_reference(data: RunData, step: Callable, placement: Placement, path: Path, resuming: bool) -> RunData:
    """The data with the "reference" of every pair, float32 [B, M, 2], in its batches.

    step: batch -> `examine_reference` of it by the start weights, alike on every host. path: the file that keeps the
    numbers; one that is there is read when `resuming`, else made anew.
    """
    if resuming and path.exists():
        known = np.load(path)
    else:
        known = _log_probs(data, step, placement)
        if jax.process_index() == 0:
            _write(path, known)

    def batches(first: int) -> Generator[Batch]:
        with contextlib.closing(data.batches(first)) as made:
            for batch in made:
                yield batch | {"reference": known[batch["record"]]}

    validation = [(made, placed | {"reference": step(placed)[1]}) for made, placed in data.validation]
    notes = [*data.notes, f"{path} keeps what the start says of the pairs"]
    return dataclasses.replace(data, batches=batches, validation=validation, notes=notes)


def _log_probs(data: RunData, step: Callable, placement: Placement) -> np.ndarray:
    """The log-probabilities float32 [R + 1, 2] of the records that the run shows, by index.

    The last row is 0, for places of a batch that hold no pair (-1). The run's own batches show the records, so that
    there are no more shapes to compile.
    """
    found: dict[int, np.ndarray] = {}
    with contextlib.closing(data.once()) as made:
        for batch in made:
            placed = placement.batches(batch)
            for part in range(len(batch["targets"])):
                records, log_p = map(np.asarray, step(jax.tree.map(lambda x, part=part: x[part], placed)))
                found |= zip(records[records >= 0].tolist(), log_p[records >= 0], strict=True)
    known = np.zeros((max(found) + 2, 2), np.float32)
    known[list(found)] = list(found.values())
    return known


def _write(path: Path, known: np.ndarray) -> None:
    """Writes the file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial.npy")
    np.save(temporary, known)
    temporary.replace(path)
