"""Live batches side by side, of which each has a core of a CPU, behind the methods of one.

XLA spreads a large product over the cores of a CPU. The products of a small model's decode steps are not large, and
attention to the cache is one small product after the other, so that one batch has little use for a second core.
Batches of fewer rows that run at the same time have. Each of them reads all weights: for a model whose weights the
caches of the cores do not hold, and on any device but a CPU, there is one batch.
"""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from qwenvl_jax.inference.batch_programs import Prefilled
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.slots import LiveBatch
from qwenvl_jax.inference.steps import Grown

FEWEST_ROWS = 8  # of a batch beside others
SMALL_MODEL = 64 * 2**20  # bytes of weights; at 28 MiB two batches take 0.7 of the time of one, at 115 MiB as long


def side_by_side(generator: Generator, slots: int) -> int:
    """How many batches so many replies at one time are best divided into."""
    devices: list[Any] = generator.layout.devices
    if len(devices) != 1 or devices[0].platform != "cpu" or sum(leaf.nbytes for leaf in generator.leaves) > SMALL_MODEL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cores, slots // FEWEST_ROWS), 1)


class LiveBatches:
    """As many replies as `most`, in these batches; the methods of `LiveBatch`. Not for several threads."""

    def __init__(self, batches: list[LiveBatch], most: int):
        self.batches, self.most = batches, most
        # A CPU runs what one thread has asked for in that order, one after the other.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="batch") for _ in batches]

    def start(self) -> None:
        """Empties all of them."""
        for batch in self.batches:
            batch.start()

    @property
    def replies(self) -> list[Any]:
        """Who has which row, over all batches; None where nobody has."""
        return [reply for batch in self.batches for reply in batch.replies]

    @property
    def live(self) -> np.ndarray:
        """bool, the rows that are taken."""
        return np.concatenate([batch.live for batch in self.batches])

    @property
    def filled(self) -> int:
        """Slots in use, over all rows."""
        return sum(batch.filled for batch in self.batches)

    def put(self, reply: Any, one: Prefilled, ids: np.ndarray) -> int:
        """`LiveBatch.put`, where there are fewest."""
        return min(self.batches, key=lambda batch: np.sum(batch.live)).put(reply, one, ids)

    def allow(self, reply: Any, tokens: np.ndarray) -> None:
        """`LiveBatch.allow`."""
        self._of(reply).allow(reply, tokens)

    def drop(self, reply: Any) -> None:
        """`LiveBatch.drop`."""
        self._of(reply).drop(reply)

    def clear(self) -> None:
        """`LiveBatch.clear`."""
        for batch in self.batches:
            batch.clear()

    def decode(self, steps: int, speculate: bool = False) -> list[tuple[Grown, list[Any], list[int]]]:
        """`LiveBatch.decode` of each batch that has replies."""
        busy = [index for index, batch in enumerate(self.batches) if batch.live.any()]
        if len(busy) == 1:  # in this thread, which is faster by the time that it takes to ask another
            return [self.batches[busy[0]].decode(steps, speculate)]
        asked = [self._threads[index].submit(self.batches[index].decode, steps, speculate) for index in busy]
        wait(asked)  # also where one fails: nothing goes on behind whoever starts again
        return [one.result() for one in asked]

    def note(self, reply: Any, generated: int, mark: int) -> None:
        """`LiveBatch.note`."""
        self._of(reply).note(reply, generated, mark)

    def _of(self, reply: Any) -> LiveBatch:
        return next(batch for batch in self.batches if reply in batch.replies)
