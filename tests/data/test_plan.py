"""Plans hold every record once a pass, within their budgets, and waste little."""

import bisect
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.data.plan import BUCKETS, BatchShape, best_fit, bucket_lengths, make_plan, picture_slots


def orders(records, seed: int, count: int | None = None):
    """Shuffled passes over the records (or as many as there are), without end where there is no count."""
    for epoch in itertools.count() if count is None else range(count):
        yield np.random.default_rng([seed, epoch]).permutation(records)


def made_up(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and pictures of records of uneven length, some without a picture."""
    rng = np.random.default_rng(seed)
    pictures = rng.choice([0, 1, 1, 1, 2, 4], count)
    return np.minimum(rng.lognormal(4.5, 0.8, count).astype(np.int32) + 258 * pictures, 2048), pictures


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 9), rows=st.sampled_from([1, 2, 8]), packing=st.booleans())
def test_every_pass_holds_every_record_once_within_the_budgets(count, seed, rows, packing):
    tokens, pictures = made_up(count, seed)
    records = np.flatnonzero(np.arange(count) % 7 != 3).astype(np.int32)  # some are left out
    slots = picture_slots(tokens[records], pictures[records], rows, 2048, packing)
    assert slots % rows == 0
    shape = BatchShape(rows, 2048, slots)
    passes = orders(records, seed, 3)
    plan = make_plan(passes, tokens, pictures, shape, packing=packing, seed=seed)
    assert sorted(plan.records) == sorted([*records] * 3)
    for number in range(len(plan)):
        length, batch = plan[number]
        assert 1 <= len(batch) <= rows
        assert length <= 2048
        assert all(len(row) and tokens[row].sum() <= length for row in batch)
        assert sum(pictures[row].sum() for row in batch) <= shape.pictures
        assert packing or all(len(row) == 1 for row in batch)
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_a_plan_repeats_and_another_seed_has_another_order():
    tokens, pictures = made_up(2000)
    shape = BatchShape(4, 2048, 40)

    def planned(seed):
        return make_plan(orders(2000, 0, 2), tokens, pictures, shape, packing=True, seed=seed).records.tolist()

    assert planned(1) == planned(1)
    assert planned(1) != planned(2)


def test_as_many_batches_as_steps_are_wanted():
    tokens, pictures = made_up(20)
    shape = BatchShape(4, 2048, 40)
    plan = make_plan(orders(20, 0), tokens, pictures, shape, packing=True, seed=0, batches=37)
    assert len(plan) == 37
    _, counts = np.unique(plan.records, return_counts=True)
    assert counts.max() - counts.min() <= 2  # batches do not end where passes do
    assert {len(plan[number][1]) for number in range(37)} == {4}


def test_best_fit_fills_rows():
    tokens, pictures = made_up(5000)
    shape = BatchShape(8, 2048, picture_slots(tokens, pictures, 8, 2048, True))
    plan = make_plan(orders(5000, 0, 1), tokens, pictures, shape, packing=True, seed=0)
    assert tokens.sum() / (len(plan) * 8 * 2048) > 0.98
    assert pictures.sum() / (len(plan) * shape.pictures) > 0.75


@pytest.mark.parametrize("packing", [True, False])
def test_batches_that_show_every_record_once(packing):
    tokens, pictures = made_up(60)
    shape = BatchShape(2, 2048, picture_slots(tokens, pictures, 2, 2048, packing))
    plan = make_plan(orders(60, 0, 3), tokens, pictures, shape, packing=packing, seed=0)
    for count in (1, len(plan) // 2, len(plan)):
        shown = [{int(r) for row in plan[number][1] for r in row} for number in range(count)]
        wanted = set().union(*shown)
        assert plan.shown(count) == next(n for n in range(1, count + 1) if set().union(*shown[:n]) == wanted)


def test_buckets_pad_little_with_few_lengths():
    tokens, pictures = made_up(5000)
    plan = make_plan(orders(5000, 0, 1), tokens, pictures, BatchShape(8, 2048, 32), packing=False, seed=0)
    assert len(set(plan.lengths.tolist())) == BUCKETS
    assert tokens.sum() / sum(8 * length for length in plan.lengths) > 0.7


def test_a_record_goes_where_it_leaves_the_least_room():
    tokens, pictures = np.array([6, 5, 4, 3, 2]), np.array([1, 1, 0, 0, 1])
    assert best_fit([4, 3, 2, 1, 0], tokens, pictures, 10, 9) == [[0, 2], [1, 3, 4]]
    assert best_fit([4, 3, 2, 1, 0], tokens, pictures, 10, 1) == [[0, 2], [1, 3], [4]]


def test_batches_hold_a_mixture_of_lengths():
    """Packing sorts by length; what comes out must not, or the first steps would see only the longest records."""
    tokens, pictures = made_up(1000)
    shape = BatchShape(8, 2048, 0)
    plan = make_plan(orders(1000, 0, 1), tokens, np.zeros_like(pictures), shape, packing=True, seed=0)
    means = [tokens[np.concatenate(plan[number][1])].mean() for number in range(len(plan) - 1)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


def test_bucket_lengths_are_the_best_of_all():
    tokens = np.array([10, 60, 64, 65, 200, 210, 300, 500, 500, 640])
    lengths = bucket_lengths(tokens, 2048)

    def padded(lengths):
        return sum(lengths[bisect.bisect_left(lengths, length)] for length in tokens)

    choices = [sorted({*choice, 640}) for choice in itertools.combinations_with_replacement(range(64, 640, 64), 3)]
    assert padded(lengths) == min(map(padded, choices))
    assert len(lengths) <= BUCKETS
    assert bucket_lengths(np.array([0, 5]), 50) == [50]
