"""The sizes that there are programs for: every length has one, and a step to the next is no larger than it must be."""

import itertools

import pytest

from qwenvl_jax.inference import sizes


@pytest.mark.parametrize("length", [2, 64, 100, 1024, 2048, 5000])
def test_every_prompt_has_a_size_that_is_at_most_double(length):
    found = sizes.of_prompts(length)
    assert found[-1] == length
    assert all(small < large <= 2 * small for small, large in itertools.pairwise(found))


@pytest.mark.parametrize("slots", [1, 3, 4, 5, 17, 32])
@pytest.mark.parametrize("length", [100, 1024, 2048])
def test_every_batch_has_a_size(slots, length):
    found = sizes.of_batches(slots, length)
    assert {1, slots} <= set(found)
    most = 4 if slots <= sizes.FEW_SLOTS else 2
    for of_rows in found.values():
        assert of_rows[-1] == length
        assert all(small < large <= most * small for small, large in itertools.pairwise(of_rows))
    assert all(large <= 4 * small + 3 or small == 1 for small, large in itertools.pairwise(sorted(found)))
    assert all(set(found[rows]) <= set(found[slots]) for rows in found)  # moved from one number of rows to another


def test_few_slots_need_few_programs():
    def programs(slots: int) -> int:
        return sum(map(len, sizes.of_batches(slots, 2048).values()))

    assert programs(3) <= 6 < programs(8)
