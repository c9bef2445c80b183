"""Grain pipelines: random-access sources, read ahead in worker processes."""

import contextlib
import gc
from collections.abc import Generator, Iterator

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

    def collate(self, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays [splits, ...] of as many batches; slots count the pictures of all hosts."""
        size, queries = len(self.share), self.rows.config.visual.n_queries
        batches = [collate(rows[i : i + size], queries, self.share.start) for i in range(0, len(rows), size)]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def batches(rows: SceneRows, *, first: int, workers: int, splits: int = 1, share: range | None = None):
    """An iterator over the batches of `rows` from number `first` on, in order, each once, as arrays [splits, ...].

    A batch comes as `splits` smaller ones, for the gradients of one after the other; `share` are the sequences of each
    that this host reads, all by default. A row is a pure function of its index, so the number of batches done is all
    the state that the data has.
    """
    host = HostRows(rows, splits, range(rows.batch_size // splits) if share is None else share)
    size = splits * len(host.share)
    return iter(_dataset(host, first * size, workers, buffer=size).batch(size, batch_fn=host.collate))


def ahead(source, *, first: int, workers: int, stop: int | None = None) -> Generator:
    """source[first], source[first + 1], ... up to `stop`, in order, each once; without workers, in this process.

    The order is the same for any number of workers.
    """
    if first < len(source):
        with closing(iter(_dataset(source, first, workers, buffer=1, stop=stop))) as made:
            yield from made


@contextlib.contextmanager
def closing(made) -> Iterator:
    """`contextlib.closing` for Grain's iterators.

    Their threads end in an exception, and its cycle of references holds the last element, which is shared memory: left
    to the end of the program, it would be reported as leaked.
    """
    try:
        with contextlib.closing(made):
            yield made
    finally:
        gc.collect()


def _dataset(source, first: int, workers: int, buffer: int, stop: int | None = None):
    """The elements of `source` from `first` up to `stop`; a worker keeps `buffer` in the making and as many made."""
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read an absl flag that only absl programs parse
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
    dataset = grain.MapDataset.source(source)[first:stop].to_iter_dataset(reading)
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2 * buffer))
