"""Sources of records mixed by weight and shuffled, without any state: what comes at an index follows from the index."""

import functools
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.data.records import Record, Records

_ROUNDS = 4  # of the cipher behind the shuffle


def shuffled(index: int, length: int, seed: int) -> int:
    """Where `index` goes in a permutation of 0..length-1 that `seed` chooses, in constant time and memory."""
    from grain.experimental import index_shuffle  # slow to import

    return index_shuffle(index, max_index=length - 1, seed=seed % 2**32, rounds=_ROUNDS)


class Mixture:
    """An endless shuffled sequence of the records of several sources; `len` is the length of an epoch.

    A source takes its share of each epoch, `weight / sum(weights)` to within one record, at random places. It shows
    all its records once, in an order of its own, before any of them again; so a source with a large weight comes round
    more than once an epoch, one with a small weight takes several epochs. Without weights, each epoch shows every
    record once. `mixture[index]` is a pure function of the seed and the index (0, 1, ...), also beyond the first epoch.
    """

    def __init__(self, sources: Sequence[Records], weights: Sequence[float] | None = None, seed: int = 0):
        sizes = [len(source) for source in sources]
        if not sizes or min(sizes) < 1:
            raise UserError("a mixture needs at least one source, and no source may be empty")
        weights = sizes if weights is None else weights
        if len(weights) != len(sizes) or not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"a mixture of {len(sizes)} sources needs as many weights above 0, not {list(weights)}")
        self.sources = list(sources)
        self.seed = seed
        # Rounding the running sums keeps their total.
        shares = np.cumsum(np.asarray(weights, np.float64)) / sum(weights)
        self._ends = np.rint(shares * sum(sizes)).astype(np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, number of its record) at `index`."""
        if index < 0:
            raise IndexError(f"{index}: a mixture is counted from 0")
        epoch, place = divmod(int(index), len(self))
        place = shuffled(place, len(self), hash_seed(self.seed, epoch))
        source = int(np.searchsorted(self._ends, place, side="right"))
        start = int(self._ends[source - 1]) if source else 0
        share = int(self._ends[source]) - start
        size = len(self.sources[source])
        # The source's own running number, over all epochs, says which of its rounds this is.
        passes, item = divmod(epoch * share + place - start, size)
        return source, shuffled(item, size, hash_seed(self.seed, passes, source + 1))

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises RecordError where it cannot be read."""
        source, item = self.locate(index)
        return self.sources[source][item]


@functools.lru_cache(maxsize=1024)
def hash_seed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers: neighbours have nothing in common."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)[0])
