"""Grain pipelines: random-access rows to batches, drawn ahead in worker processes."""

from functools import partial

import grain
from absl import flags

from qwenvl_jax.data.packing import collate
from qwenvl_jax.data.scene_rows import SceneRows


def batches(rows: SceneRows, *, first: int, workers: int):
    """An iterator over the batches of `rows` from number `first` on, in order, each once.

    A row is a pure function of its index, so the number of batches done is all the state that the data has.
    """
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read an absl flag that only absl programs parse
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=rows.batch_size)
    dataset = grain.MapDataset.source(rows)[first * rows.batch_size :].to_iter_dataset(reading)
    ahead = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2 * rows.batch_size)
    dataset = dataset.mp_prefetch(ahead)
    return iter(dataset.batch(rows.batch_size, batch_fn=partial(collate, queries=rows.config.visual.n_queries)))
