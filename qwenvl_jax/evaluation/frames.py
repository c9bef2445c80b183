"""Frames of videos, sampled as SEED-Bench and the original do: evenly, each in the middle of its share.

Decoding needs PyAV (`pip install "qwenvl-jax[data]"`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenvl_jax.config import UserError


def frame_offsets(length: int, count: int) -> list[int]:
    """Which of `length` frames to take: all where there are fewer than `count`."""
    if count > length:
        return list(range(length))
    share = (length - 1) / count
    start = int(share / 2)
    return [start + int(np.round(share * number)) for number in range(count)]


def frame_numbers(length: int, rate: float, segment: Sequence[float] | None, count: int) -> list[int]:
    """The frames to show of a video of `length` frames.

    segment: of the question, in frames (whole numbers, Breakfast) or in seconds (EPIC-Kitchens), or none: the whole
    video (Something-Something).
    """
    if segment is None:
        return frame_offsets(length - 1, count)
    if isinstance(segment[0], int):
        first, last = segment[0], min(int(segment[1]), length)
    else:
        first, last = (int(min(max(second * rate, 0), length - 1)) for second in segment[:2])
    return [first + offset for offset in frame_offsets(last - first, count)]


def sample_frames(path: Path, segment: Sequence[float] | None, count: int) -> list[Image.Image]:
    """The frames of a video. Raises UserError where it cannot be read."""
    length, rate = _measure(path)
    wanted = frame_numbers(length, rate, segment, count)
    if not wanted:
        raise UserError(f"{path}: has {length} frames, and none in the segment {segment}")
    found: dict[int, Image.Image] = {}
    for number, frame in enumerate(_decoded(path)):
        if number in wanted:
            found[number] = frame.to_image()
        if number >= max(wanted):
            break
    if set(wanted) - set(found):
        raise UserError(f"{path}: ends before frame {max(wanted)}")
    return [found[number] for number in wanted]


def _measure(path: Path) -> tuple[int, float]:
    """Number of frames and frames per second. Frames are counted, as what a file says of itself is often wrong."""
    av = pyav()
    try:
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or 0)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: no video that can be read ({error})") from None
    return sum(1 for _ in _decoded(path)), rate


def _decoded(path: Path) -> Iterator[Any]:
    av = pyav()
    try:
        with av.open(str(path)) as container:
            yield from container.decode(video=0)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: no video that can be read ({error})") from None


def pyav() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError('videos are decoded by PyAV, which is missing: pip install "qwenvl-jax[data]"') from None
    return av
