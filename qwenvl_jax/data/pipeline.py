"""Grain pipelines: random-access rows to batches, drawn ahead in worker processes."""

from functools import partial

import grain
import numpy as np
from absl import flags

from qwenvl_jax.data.packing import collate
from qwenvl_jax.data.scene_rows import SceneRows


class HostRows:
    """Of each batch of `rows` what this host reads, in order: `share` of each of its `splits` smaller ones."""

    def __init__(self, rows: SceneRows, splits: int, share: range):
        self.rows, self.splits, self.share = rows, splits, share

    def __len__(self) -> int:
        return len(self.rows) // self.rows.batch_size * self.splits * len(self.share)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, place = divmod(index, len(self.share))  # of the smaller batch, counted over all; in its share
        return self.rows[number * (self.rows.batch_size // self.splits) + self.share[place]]


def collate_splits(rows: list[dict[str, np.ndarray]], splits: int, queries: int) -> dict[str, np.ndarray]:
    """Arrays [splits, ...] of as many batches, each of them as `collate` makes it."""
    size = len(rows) // splits
    batches = [collate(rows[start : start + size], queries) for start in range(0, len(rows), size)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def batches(rows: SceneRows, *, first: int, workers: int, splits: int = 1, share: range | None = None):
    """An iterator over the batches of `rows` from number `first` on, in order, each once, as arrays [splits, ...].

    A batch comes as `splits` smaller ones, for the gradients of one after the other; `share` are the sequences of each
    that this host reads, all by default. A row is a pure function of its index, so the number of batches done is all
    the state that the data has.
    """
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read an absl flag that only absl programs parse
        flags.FLAGS.mark_as_parsed()
    host = HostRows(rows, splits, range(rows.batch_size // splits) if share is None else share)
    size = splits * len(host.share)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=size)
    dataset = grain.MapDataset.source(host)[first * size :].to_iter_dataset(reading)
    ahead = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2 * size)
    dataset = dataset.mp_prefetch(ahead)
    queries = rows.config.visual.n_queries
    return iter(dataset.batch(size, batch_fn=partial(collate_splits, splits=splits, queries=queries)))
