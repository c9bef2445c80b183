"""Grain pipelines: random-access rows to batches, drawn ahead in worker processes, with a state to save."""

from functools import partial

import grain
from absl import flags

from qwenvl_jax.data.packing import collate
from qwenvl_jax.data.scene_rows import SceneRows


def batches(rows: SceneRows, *, workers: int, queries: int):
    """An iterator over batches of `rows`, in order, each once. `get_state` and `set_state` make it resume exactly."""
    if not flags.FLAGS.is_parsed():  # Grain's worker processes read an absl flag that only absl programs parse
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=rows.batch_size)
    dataset = grain.MapDataset.source(rows).to_iter_dataset(reading)
    ahead = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2 * rows.batch_size)
    dataset = dataset.mp_prefetch(ahead)
    return iter(dataset.batch(rows.batch_size, batch_fn=partial(collate, queries=queries)))
