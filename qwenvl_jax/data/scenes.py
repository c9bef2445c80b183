"""What a scene is and how one is sampled: a few coloured shapes, sometimes a word or a number, on a quiet background.

A scene is a pure function of (seed, split, index): nothing is stored and nothing is downloaded. Pixels are drawn in
`scene_drawing.py`, questions are asked in `questions.py`; this file knows neither colours of paint nor words.

The test split holds what training never shows: `HELD_OUT_PAIRS` of colour and shape, `HELD_OUT_COUNT` objects in one
picture, and written words whose spelling is not drawn in training (`spelled_in_test`).
"""

import dataclasses
import math
import zlib

import numpy as np
from PIL import Image

from qwenvl_jax.data.scene_drawing import draw_scene, glyph_metrics
from qwenvl_jax.data.scene_paint import Background, sample_background_for, sample_rgb, text_rgb
from qwenvl_jax.data.scene_shapes import UNIT_SHAPES, inside_polygon, rotation_matrix
from qwenvl_jax.data.scene_text import WORDS

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("small", "large")
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SPLITS = ("train", "val", "test")

HELD_OUT_PAIRS = (("orange", "star"), ("purple", "triangle"), ("pink", "square"), ("green", "diamond"))
HELD_OUT_COUNT = 5
TEST_SHARE_PAIRS = 0.25
TEST_SHARE_COUNT = 0.12

SIZE_RANGES = {"small": (0.15, 0.20), "large": (0.26, 0.34)}  # side of the shape over the shorter side of the picture
LETTER_HEIGHTS = (0.14, 0.22)  # height of a capital over the height of the picture
MAX_OVERLAP = 0.10  # of the smaller of two boxes
FILLS = ("flat", "flat", "flat", "gradient", "outline")  # as often as they stand here


@dataclasses.dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape. Centre and side in native pixels of the picture, rotation in radians, rgb as drawn (0..255)."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    side: float
    rotation: float
    fill: str
    rgb: tuple[int, int, int]

    @property
    def held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT_PAIRS

    @property
    def vertices(self) -> np.ndarray | None:
        """Corners float64 [V, 2] in pixels, or None for a circle."""
        if self.shape == "circle":
            return None
        return UNIT_SHAPES[self.shape] @ rotation_matrix(self.rotation).T * self.side + (self.x, self.y)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Tight corners (x1, y1, x2, y2) in pixels."""
        vertices = self.vertices
        if vertices is None:
            half = self.side / 2
            return (self.x - half, self.y - half, self.x + half, self.y + half)
        (x1, y1), (x2, y2) = vertices.min(axis=0).tolist(), vertices.max(axis=0).tolist()
        return (x1, y1, x2, y2)

    def covers(self, points: np.ndarray) -> np.ndarray:
        """Which of the points float [N, 2] (pixels) lie on the shape; bool [N]."""
        vertices = self.vertices
        if vertices is None:
            return ((points - (self.x, self.y)) ** 2).sum(axis=1) <= (self.side / 2) ** 2
        return inside_polygon(points, vertices)


@dataclasses.dataclass(frozen=True, slots=True)
class SceneText:
    """A written word (upper-case Latin) or number. `left` and `baseline` in pixels, `height` of a capital in pixels."""

    text: str
    left: float
    baseline: float
    height: float
    glyph_boxes: tuple[tuple[float, float, float, float], ...]
    rgb: tuple[int, int, int]

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()

    @property
    def box(self) -> tuple[float, float, float, float]:
        boxes = self.glyph_boxes
        return (boxes[0][0], min(box[1] for box in boxes), boxes[-1][2], max(box[3] for box in boxes))


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is drawn: native size in pixels, what stands on it (later objects on top), and its split."""

    split: str
    index: int
    width: int
    height: int
    background: Background
    objects: tuple[SceneObject, ...]
    text: SceneText | None

    @property
    def has_held_out_pair(self) -> bool:
        return any(thing.held_out for thing in self.objects)

    @property
    def has_held_out_count(self) -> bool:
        return len(self.objects) == HELD_OUT_COUNT

    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Tight boxes (x1, y1, x2, y2) of the objects in native pixels, in the order of `objects`."""
        return [thing.box for thing in self.objects]

    def draw(self, scale: float = 1) -> Image.Image:
        """The picture as PIL RGB, `scale` times the native size, anti-aliased."""
        return draw_scene(self, scale)

    def cell_labels(self, grid: int) -> dict[str, np.ndarray]:
        """What covers the centre of each cell of a grid x grid partition, row by row, for an auxiliary head.

        Returns int32 [grid*grid] `color`, `shape`, `size`, `glyph` (0 none, else 1 + the index in COLORS, SHAPES,
        SIZES, GLYPHS), float32 [grid*grid, 4] `box` (x1, y1, x2, y2 over the picture's width and height, of the whole
        object or the one glyph) and bool [grid*grid] `mask` (something is there). A thing so thin that it covers no
        centre labels the free cell that holds its own middle.
        """
        steps = (np.arange(grid) + 0.5) / grid
        points = np.stack(np.meshgrid(steps * self.width, steps * self.height), axis=-1).reshape(-1, 2)
        labels = {name: np.zeros(grid * grid, np.int32) for name in ("color", "shape", "size", "glyph")}
        labels["box"] = np.zeros((grid * grid, 4), np.float32)
        labels["mask"] = np.zeros(grid * grid, bool)
        extent = (self.width, self.height, self.width, self.height)
        for thing in self.objects:
            values = {
                "color": COLORS.index(thing.color) + 1,
                "shape": SHAPES.index(thing.shape) + 1,
                "size": SIZES.index(thing.size) + 1,
                "glyph": 0,
            }
            _label(labels, thing.covers(points), thing.box, extent, values)
        for character, box in zip(self.text.text, self.text.glyph_boxes, strict=True) if self.text else ():
            covered = np.all((points >= box[:2]) & (points <= box[2:]), axis=1)
            values = {"color": 0, "shape": 0, "size": 0, "glyph": GLYPHS.index(character) + 1}
            _label(labels, covered, box, extent, values)
        return labels


def _label(labels: dict, covered: np.ndarray, box, extent, values: dict) -> None:
    """Write one thing into the cells it covers, in place."""
    box = np.asarray(box, np.float64) / extent
    if not covered.any():
        grid = math.isqrt(len(covered))
        column, row = (min(int((box[i] + box[i + 2]) / 2 * grid), grid - 1) for i in (0, 1))
        if labels["mask"][row * grid + column]:
            return
        covered = np.zeros(len(covered), bool)
        covered[row * grid + column] = True
    for name, value in values.items():
        labels[name][covered] = value
    labels["box"][covered] = box
    labels["mask"][covered] = True


def spelled_in_test(text: str) -> bool:
    """Whether a written text of two or more characters belongs to the test split alone (a fifth of all spellings)."""
    return len(text) > 1 and zlib.crc32(text.encode()) % 5 == 0


def allowed_pair(color: str, shape: str, split: str) -> bool:
    """Whether the split may show or even mention this pair."""
    return split == "test" or (color, shape) not in HELD_OUT_PAIRS


def scene_rng(seed: int, split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The generator of one scene (stream 0) or of what is asked about it (stream 1); splits never share one."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split), index, stream])))


def sample_scene(seed: int, split: str, index: int, max_objects: int = 6, text_share: float = 0.4) -> Scene:
    """The scene of (seed, split, index): same arguments, same scene, on every machine.

    `max_objects` (1..6) bounds the number of objects, for a curriculum; `text_share` is the share of pictures that
    carry a written word or number. Raises ValueError for an unknown split or a bound outside 1..6.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if not 1 <= max_objects <= 6:
        raise ValueError(f"max_objects is {max_objects}; it must lie in 1..6")
    rng = scene_rng(seed, split, index)
    width, height = _sample_size(rng)
    pairs = _sample_pairs(rng, split, _sample_count(rng, split, max_objects))
    text = _sample_text(rng, split) if rng.random() < text_share else None
    paints = [sample_rgb(rng, color) for color, _ in pairs]
    background = sample_background_for(rng, paints)
    for attempt in range(1000):
        scene_text = None
        if text is not None and attempt < 20:  # later the picture is too full for writing
            scene_text = _place_text(rng, text, width, height, text_rgb(rng, background))
        objects = _place_objects(rng, pairs, paints, width, height, scene_text, small=attempt >= 6)
        if objects is not None:
            return Scene(split, index, width, height, background, objects, scene_text)
    raise RuntimeError(f"no room for {len(pairs)} objects in {width} x {height} pixels")  # never seen


def _sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Both sides in 160..256 pixels, aspect ratio between 3:4 and 4:3."""
    while True:
        width, height = (int(side) for side in rng.integers(160, 257, size=2))
        if 3 * width <= 4 * height and 3 * height <= 4 * width:
            return width, height


def _sample_count(rng: np.random.Generator, split: str, max_objects: int) -> int:
    if split == "test" and max_objects >= HELD_OUT_COUNT and rng.random() < TEST_SHARE_COUNT:
        return HELD_OUT_COUNT
    counts = [count for count in range(1, max_objects + 1) if count != HELD_OUT_COUNT]
    return counts[int(rng.integers(len(counts)))]


def _sample_pairs(rng: np.random.Generator, split: str, count: int) -> list[tuple[str, str]]:
    """(colour, shape) of each object.

    Most scenes draw from few colours or few shapes, or have one object that differs from all others in one of the two,
    so that every number is an answer: five of six red, say, though no training scene has five objects.
    """
    colors: list[tuple[str, ...]] = [COLORS] * count
    shapes: list[tuple[str, ...]] = [SHAPES] * count
    kind = rng.random()
    if kind < 0.30:
        colors = [_some(rng, COLORS, int(rng.integers(2, 4)))] * count
    if kind < 0.12 or 0.30 <= kind < 0.45:
        shapes = [_some(rng, SHAPES, int(rng.integers(2, 4)))] * count
    elif 0.45 <= kind < 0.575:
        colors = _all_but_one(rng, COLORS, count)
    elif 0.575 <= kind < 0.70:
        shapes = _all_but_one(rng, SHAPES, count)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        among_colors, among_shapes = colors[len(pairs)], shapes[len(pairs)]
        pair = among_colors[int(rng.integers(len(among_colors)))], among_shapes[int(rng.integers(len(among_shapes)))]
        if pair not in HELD_OUT_PAIRS:
            pairs.append(pair)
    if split == "test" and rng.random() < TEST_SHARE_PAIRS:
        pairs[int(rng.integers(count))] = HELD_OUT_PAIRS[int(rng.integers(len(HELD_OUT_PAIRS)))]
    return pairs


def _some(rng: np.random.Generator, values: tuple[str, ...], n: int) -> tuple[str, ...]:
    """`n` different ones of the values."""
    return tuple(values[i] for i in rng.permutation(len(values))[:n])


def _all_but_one(rng: np.random.Generator, values: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """For each object what it may be: the same one value for all, another one for one of them."""
    common, other = _some(rng, values, 2)
    odd = int(rng.integers(count))
    return [(other,) if i == odd else (common,) for i in range(count)]


def _sample_text(rng: np.random.Generator, split: str) -> str:
    """A number of one to three digits, a word of the list or two to four random letters, spelled in the split's way."""
    kind = rng.random()
    length = int(rng.integers(1, 4))
    while True:
        if kind < 0.45:
            text = str(int(rng.integers(10 ** (length - 1) if length > 1 else 0, 10**length)))
        elif kind < 0.72:
            text = WORDS[int(rng.integers(len(WORDS)))]
        else:
            text = "".join(GLYPHS[int(i)] for i in rng.integers(26, size=length + 1))
        if len(text) == 1 or spelled_in_test(text) == (split == "test"):
            return text


def _place_text(rng: np.random.Generator, text: str, width: int, height: int, rgb) -> SceneText:
    """Somewhere inside the picture, as large as LETTER_HEIGHTS and the picture's width allow."""
    metrics = [glyph_metrics(character) for character in text]
    gap = 0.06  # between letters, over the height of a capital
    starts, pen = [], -metrics[0][1]
    for advance, *_ in metrics:
        starts.append(pen)
        pen += advance + gap
    extent = starts[-1] + metrics[-1][3]
    low, high = (share * height for share in LETTER_HEIGHTS)
    size = min(low + (high - low) * rng.random(), 0.92 * width / extent)
    left = 2 + (width - 4 - extent * size) * rng.random()
    below = max(0.025, *(y2 for *_, y2 in metrics))  # J and Q reach below the line
    top = 3 + (height - 6 - (1.025 + below) * size) * rng.random()
    baseline = top + 1.025 * size
    boxes = tuple(
        (left + (start + x1) * size, baseline + y1 * size, left + (start + x2) * size, baseline + y2 * size)
        for start, (_, x1, y1, x2, y2) in zip(starts, metrics, strict=True)
    )
    return SceneText(text, left, baseline, size, boxes, rgb)


def _place_objects(rng, pairs, paints, width, height, text, small: bool) -> tuple[SceneObject, ...] | None:
    """Sizes and places for all objects, or None when they found no room (then the caller tries again)."""
    large_share = 0.0 if small else (0.5, 0.5, 0.5, 0.45, 0.35, 0.35)[len(pairs) - 1]
    may_overlap = rng.random() < 0.3
    taken = [] if text is None else [(*text.box, 0.0)]
    objects = []
    for (color, shape), rgb in zip(pairs, paints, strict=True):
        size = "large" if rng.random() < large_share else "small"
        low, high = SIZE_RANGES[size]
        side = (low + (high - low) * rng.random()) * min(width, height)
        angle = math.radians(16 * rng.random() - 8) if rng.random() < 0.5 else 0.0
        fill = FILLS[int(rng.integers(len(FILLS)))]
        thing = SceneObject(color, shape, size, 0.0, 0.0, side, angle, fill, rgb)
        place = _find_place(rng, thing.box, taken, width, height)
        if place is None:
            return None
        thing = dataclasses.replace(thing, x=place[0], y=place[1])
        objects.append(thing)
        taken.append((*thing.box, MAX_OVERLAP if may_overlap else 0.0))
    return tuple(objects)


def _find_place(rng, box, taken, width: int, height: int) -> tuple[float, float] | None:
    """A centre where `box` (around the origin) keeps clear of the boxes taken, up to the overlap that each allows."""
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    for across, down in rng.random((30, 2)).tolist():
        x = 2 - x1 + (width - 4 - (x2 - x1)) * across
        y = 2 - y1 + (height - 4 - (y2 - y1)) * down
        if all(_overlap((x + x1, y + y1, x + x2, y + y2), other[:4], area) <= other[4] for other in taken):
            return x, y
    return None


def _overlap(first, second, first_area: float) -> float:
    """Shared area over the smaller box; a trace of it for boxes that are less than 2 pixels apart."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    if across <= 0 or down <= 0:
        return 0.0 if across <= -2 or down <= -2 else 0.001
    return across * down / min(first_area, (second[2] - second[0]) * (second[3] - second[1]))
