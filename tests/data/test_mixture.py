"""Mixtures: shares, coverage, and that an index alone decides."""

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.config import UserError
from qwenvl_jax.data.mixture import Mixture, shuffled


class Numbered:
    """A source whose records are their own numbers."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return range(self.size)[index]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 100), st.integers(0, 2**63))
def test_the_shuffle_is_a_permutation(length, seed):
    assert sorted(shuffled(index, length, seed) for index in range(length)) == list(range(length))


def test_shuffles_differ_by_seed():
    orders = {tuple(shuffled(index, 50, seed) for index in range(50)) for seed in range(20)}
    assert len(orders) == 20


sizes = st.lists(st.integers(1, 15), min_size=1, max_size=4)


@settings(deadline=None, max_examples=20)
@given(sizes, st.integers(0, 1000))
def test_without_weights_an_epoch_shows_every_record_once(sizes, seed):
    mixture = Mixture([Numbered(size) for size in sizes], seed=seed)
    everything = sorted((source, item) for source, size in enumerate(sizes) for item in range(size))
    assert len(mixture) == len(everything)
    epochs = [[mixture.locate(epoch * len(mixture) + i) for i in range(len(mixture))] for epoch in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    if len(everything) > 20:
        assert epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 15), st.floats(0.1, 10)), min_size=1, max_size=4), st.integers(0, 1000))
def test_sources_have_their_shares_and_come_round_evenly(parts, seed):
    mixture = Mixture([Numbered(size) for size, _ in parts], [weight for _, weight in parts], seed)
    total = sum(weight for _, weight in parts)
    seen: Counter = Counter()
    for epoch in range(3):
        drawn = [mixture.locate(epoch * len(mixture) + index) for index in range(len(mixture))]
        seen.update(drawn)
        shares = Counter(source for source, _ in drawn)
        for source, (size, weight) in enumerate(parts):
            assert abs(shares[source] - weight / total * len(mixture)) <= 1
            counts = [seen[source, item] for item in range(size)]
            assert max(counts) - min(counts) <= 1


def test_an_index_alone_decides():
    mixture = Mixture([Numbered(10), Numbered(5)], [3, 1], seed=7)
    forwards = [mixture.locate(index) for index in range(40)]
    other = pickle.loads(pickle.dumps(mixture))
    assert [other.locate(index) for index in reversed(range(40))] == forwards[::-1]
    assert [mixture[index] for index in range(40)] == [item for _, item in forwards]
    assert [Mixture(mixture.sources, [3, 1], seed=8).locate(index) for index in range(40)] != forwards


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(UserError, match="weights above 0"):
        Mixture([Numbered(3), Numbered(3)], weights)


def test_a_mixture_of_nothing_is_refused():
    for sources in ([], [Numbered(3), Numbered(0)]):
        with pytest.raises(UserError, match="no source may be empty"):
            Mixture(sources)
    with pytest.raises(IndexError):
        Mixture([Numbered(3)])[-1]
