"""The sizes that an engine has compiled programs for: to these prompts are padded, and in these the cache grows."""

from qwenvl_jax.inference.decode import SHORTEST_BUCKET

SMALLEST_CACHE = 128  # slots
FEW_SLOTS = 4  # replies at one time, up to which there are fewer sizes of the cache


def of_prompts(length: int) -> tuple[int, ...]:
    """Lengths of prompts, ascending, up to `length`."""
    return _sizes(SHORTEST_BUCKET, length, between=256)


def of_batches(slots: int, length: int) -> dict[int, tuple[int, ...]]:
    """The sizes of the cache, ascending, for each number of rows: `slots`, a quarter of it and so on, and 1.

    What the most rows read at a step is worth half sizes; for fewer they would only be more programs. Where there are
    few at the most there are fewer sizes, too: it starts in two thirds of the time, and steps read up to four times the
    slots that they need.
    """
    if slots <= FEW_SLOTS:
        return dict.fromkeys({1, slots}, _sizes(SMALLEST_CACHE, length, factor=4))
    rows, size = [slots], slots // 4
    while size >= 4:
        rows.append(size)
        size //= 4
    coarse, fine = (_sizes(SMALLEST_CACHE, length, between) for between in (None, SMALLEST_CACHE))
    return {count: fine if count == slots else coarse for count in {1, *rows}}


def _sizes(least: int, most: int, between: int | None = None, factor: int = 2) -> tuple[int, ...]:
    """`least` times powers of `factor`, up to `most` and `most` itself; from `between` on also what is half way."""
    sizes = {most}
    size = least
    while size < most:
        sizes.add(size)
        if between is not None and size >= between and size * 3 // 2 < most:
            sizes.add(size * 3 // 2)
        size *= factor
    return tuple(sorted(sizes))
