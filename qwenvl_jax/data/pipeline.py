"""Grain pipelines: random-access sources, read ahead in worker processes."""

from functools import partial

import grain
from absl import flags

from qwenvl_jax.data.packing import collate
from qwenvl_jax.data.scene_rows import SceneRows


def batches(rows: SceneRows, *, first: int, workers: int):
    """An iterator over the batches of `rows` from number `first` on, in order, each once.

    A row is a pure function of its index, so the number of batches done is all the state that the data has.
    """
    dataset = _dataset(rows, first * rows.batch_size, workers, buffer=rows.batch_size)
    return iter(dataset.batch(rows.batch_size, batch_fn=partial(collate, queries=rows.config.visual.n_queries)))


def ahead(source, *, first: int, workers: int):
    """An iterator over source[first], source[first + 1], ..., in order, each once; without workers, in this process.

    The order is the same for any number of workers.
    """
    return iter(_dataset(source, first, workers, buffer=1)) if first < len(source) else iter(())


def _dataset(source, first: int, workers: int, buffer: int):
    """The elements of `source` from number `first` on; each worker keeps `buffer` in the making and as many made."""
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read an absl flag that only absl programs parse
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
    dataset = grain.MapDataset.source(source)[first:].to_iter_dataset(reading)
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2 * buffer))
