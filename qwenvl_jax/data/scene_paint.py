"""The paint of scenes: the rgb values a colour name stands for, backgrounds, and what stands out from what."""

import colorsys
import dataclasses
import math

import numpy as np

Rgb = tuple[int, int, int]

# Ranges of (hue in degrees, saturation, value). They are wide enough that the plain paints of other programs
# fall inside, and far enough apart that no two names share a paint.
PAINTS = {
    "red": ((-8, 6), (0.80, 1.0), (0.72, 1.0)),
    "orange": ((25, 39), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((51, 60), (0.75, 1.0), (0.90, 1.0)),
    "green": ((100, 150), (0.60, 1.0), (0.45, 1.0)),
    "blue": ((208, 242), (0.70, 1.0), (0.65, 1.0)),
    "purple": ((272, 300), (0.60, 1.0), (0.48, 0.75)),
    "pink": ((318, 348), (0.26, 0.60), (0.95, 1.0)),
    "black": ((0, 360), (0.0, 0.25), (0.0, 0.12)),
}
BACKGROUND_KINDS = ("paper", "plain", "gradient", "noise", "stripes", "checker")
GOOD_CONTRAST, LEAST_CONTRAST = 185.0, 120.0  # of `color_distance`, between a thing and the ground it stands on


@dataclasses.dataclass(frozen=True, slots=True)
class Background:
    """One of BACKGROUND_KINDS in two near colours; `period` in pixels, `angle` in radians, `seed` of the noise."""

    kind: str
    first: Rgb
    second: Rgb
    period: float
    angle: float
    seed: int


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def _rgb(hue: float, saturation: float, value: float) -> Rgb:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))
    return red, green, blue


def sample_rgb(rng: np.random.Generator, color: str) -> Rgb:
    """One paint of the colour's name."""
    return _rgb(*(_between(rng, bounds) for bounds in PAINTS[color]))


def color_distance(first: Rgb, second: Rgb) -> float:
    """A cheap perceptual distance: Euclidean in rgb with the weights of the "redmean" formula; 0 to about 765."""
    mean_red = (first[0] + second[0]) / 2
    red, green, blue = (a - b for a, b in zip(first, second, strict=True))
    return math.sqrt((2 + mean_red / 256) * red**2 + 4 * green**2 + (2 + (255 - mean_red) / 256) * blue**2)


def sample_background_for(rng: np.random.Generator, paints: list[Rgb]) -> Background:
    """A background that the paints stand out from: well if one is found soon, at least visibly otherwise."""
    wanted = GOOD_CONTRAST
    while True:
        background = sample_background(rng)
        grounds = (background.first, background.second)
        if all(color_distance(paint, ground) >= wanted for paint in paints for ground in grounds):
            return background
        wanted = max(LEAST_CONTRAST, wanted - 5)


def sample_background(rng: np.random.Generator) -> Background:
    """White paper in a quarter of the draws, else a light (mostly) or dark ground, grey or tinted, in some pattern."""
    noise_seed = int(rng.integers(2**32))
    if rng.random() < 0.25:
        paper = (round(_between(rng, (246, 255))),) * 3
        return Background("paper", paper, paper, 1.0, 0.0, noise_seed)
    dark = rng.random() < 0.25
    hue = 360 * rng.random()
    saturation = _between(rng, (0.0, 0.45 if dark else 0.25)) if rng.random() < 0.6 else 0.0
    value = _between(rng, (0.14, 0.34) if dark else (0.80, 1.0))
    step = _between(rng, (0.04, 0.10))
    first = _rgb(hue, saturation, value)
    second = _rgb(hue + _between(rng, (-40, 40)), saturation, value + step if dark else value - step)
    kind = BACKGROUND_KINDS[int(rng.integers(1, len(BACKGROUND_KINDS)))]
    return Background(
        kind,
        first,
        first if kind == "plain" else second,
        period=_between(rng, (10, 44)),
        angle=math.pi * rng.random(),
        seed=noise_seed,
    )


def text_rgb(rng: np.random.Generator, background: Background) -> Rgb:
    """Ink that is nearly black on a light ground and nearly white on a dark one."""
    if sum(background.first) > 3 * 128:
        return _rgb(360 * rng.random(), _between(rng, (0.0, 0.6)), _between(rng, (0.0, 0.25)))
    return _rgb(360 * rng.random(), _between(rng, (0.0, 0.12)), _between(rng, (0.9, 1.0)))
