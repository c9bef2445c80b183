"""What scenes promise: the same for the same arguments, nothing held out in training, boxes that fit the pixels."""

import dataclasses

import numpy as np
import pytest

from qwenvl_jax.data.scene_paint import PAINTS, color_distance, sample_rgb
from qwenvl_jax.data.scenes import (
    COLORS,
    GLYPHS,
    HELD_OUT_COUNT,
    HELD_OUT_PAIRS,
    MAX_OVERLAP,
    SHAPES,
    SIZES,
    sample_scene,
    scene_rng,
    spelled_in_test,
)


def scenes(split, count, seed=0):
    return [sample_scene(seed, split, index) for index in range(count)]


def test_same_arguments_same_scene_and_pixels():
    for index in range(20):
        first, second = sample_scene(3, "val", index), sample_scene(3, "val", index)
        assert first == second
        assert np.array_equal(first.draw(), second.draw())
    assert sample_scene(3, "val", 0) != sample_scene(4, "val", 0)


def test_splits_share_no_random_stream():
    draws = [
        tuple(scene_rng(seed, split, index, stream).integers(2**63, size=2).tolist())
        for seed in range(5)
        for split in ("train", "val", "test")
        for index in range(50)
        for stream in (0, 1)
    ]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_and_validation_never_show_what_is_held_out(split):
    for scene in scenes(split, 2500):
        assert not scene.has_held_out_pair
        assert not any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in scene.objects)
        assert len(scene.objects) != HELD_OUT_COUNT
        assert scene.text is None or not spelled_in_test(scene.text.text)


def test_the_test_split_shows_what_is_held_out():
    found = scenes("test", 1500)
    assert 0.20 < np.mean([scene.has_held_out_pair for scene in found]) < 0.30
    assert 0.09 < np.mean([scene.has_held_out_count for scene in found]) < 0.15
    for scene in found:
        assert scene.text is None or len(scene.text.text) == 1 or spelled_in_test(scene.text.text)


def test_everything_occurs_in_training():
    found = scenes("train", 1500)
    pairs = {(thing.color, thing.shape) for scene in found for thing in scene.objects}
    assert len(pairs) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)
    assert {len(scene.objects) for scene in found} == {1, 2, 3, 4, 6}
    assert {character for scene in found if scene.text for character in scene.text.text} == set(GLYPHS)
    assert {thing.size for scene in found for thing in scene.objects} == set(SIZES)


def test_max_objects_bounds_the_count_and_nonsense_is_refused():
    assert {len(sample_scene(0, "train", index, max_objects=2).objects) for index in range(60)} == {1, 2}
    with pytest.raises(ValueError, match="max_objects is 7"):
        sample_scene(0, "train", 0, max_objects=7)
    with pytest.raises(ValueError, match="train, val, test"):
        sample_scene(0, "dev", 0)


def overlap_of_smaller(first, second):
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(across, 0) * max(down, 0) / min(areas)


def test_boxes_lie_inside_and_overlap_little():
    for scene in scenes("test", 400):
        assert 160 <= scene.width <= 256
        assert 160 <= scene.height <= 256
        assert 3 / 4 <= scene.width / scene.height <= 4 / 3
        boxes = scene.boxes()
        for x1, y1, x2, y2 in [*boxes, *([scene.text.box] if scene.text else [])]:
            assert 0 <= x1 < x2 <= scene.width
            assert 0 <= y1 < y2 <= scene.height
        for index, box in enumerate(boxes):
            assert all(overlap_of_smaller(box, other) <= MAX_OVERLAP + 1e-9 for other in boxes[:index])
            assert scene.text is None or overlap_of_smaller(box, scene.text.box) == 0
        shorter = min(scene.width, scene.height)
        for thing in scene.objects:
            low, high = {"small": (0.15, 0.20), "large": (0.26, 0.34)}[thing.size]
            assert low <= thing.side / shorter <= high
        assert scene.text is None or scene.text.height >= 0.14 * scene.height or scene.text.box[2] > 0.9 * scene.width


def changed_box(scene, without, scale):
    """Bounding box in native pixels of where a picture differs from the picture without something."""
    difference = np.abs(np.asarray(scene.draw(scale), int) - np.asarray(without.draw(scale), int)).max(axis=2) > 20
    rows, columns = np.flatnonzero(difference.any(axis=1)), np.flatnonzero(difference.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / scale


@pytest.mark.parametrize("scale", [1, 2.5])
def test_pixels_fill_the_boxes_in_the_right_colour(scale):
    for index in range(40):
        scene = sample_scene(1, "test", index)
        last = scene.objects[-1]  # nothing covers it
        bare = dataclasses.replace(scene, objects=scene.objects[:-1])
        np.testing.assert_allclose(changed_box(scene, bare, scale), last.box, atol=1.6)
        picture = np.asarray(scene.draw(scale))
        assert picture.shape == (round(scene.height * scale), round(scene.width * scale), 3)
        middle = picture[int(last.y * scale), int(last.x * scale)]
        nearest = min(COLORS, key=lambda color: paint_distance(middle, color))
        assert nearest == last.color
        if scene.text is not None:
            np.testing.assert_allclose(
                changed_box(scene, dataclasses.replace(scene, text=None), scale), scene.text.box, atol=1.6
            )


PAINT_SAMPLES = {color: [sample_rgb(np.random.default_rng(i), color) for i in range(150)] for color in PAINTS}


def paint_distance(rgb, color):
    return min(color_distance(tuple(int(part) for part in rgb), paint) for paint in PAINT_SAMPLES[color])


def test_no_two_colour_names_share_a_paint():
    for color, paints in PAINT_SAMPLES.items():
        for other in set(COLORS) - {color}:
            assert min(paint_distance(paint, other) for paint in paints[:40]) > 40, (color, other)


def test_cell_labels_agree_with_the_pixels_of_single_things():
    grid = 12
    for index in range(30):
        scene = sample_scene(2, "train", index)
        labels = scene.cell_labels(grid)
        assert labels["box"].shape == (grid * grid, 4)
        assert labels["box"].dtype == np.float32
        assert all(labels[name].dtype == np.int32 for name in ("color", "shape", "size", "glyph"))
        something = (labels["color"] > 0) | (labels["glyph"] > 0)
        assert np.array_equal(something, labels["mask"])
        # The topmost object: every cell labelled with it has some of its paint.
        last = scene.objects[-1]
        bare = dataclasses.replace(scene, objects=scene.objects[:-1])
        drawn = np.abs(np.asarray(scene.draw(), int) - np.asarray(bare.draw(), int)).max(axis=2) > 20
        owned = np.isclose(
            labels["box"], np.array(last.box) / (scene.width, scene.height, scene.width, scene.height), atol=1e-6
        ).all(axis=1)
        for cell in np.flatnonzero(owned):
            assert COLORS[labels["color"][cell] - 1] == last.color
            assert SHAPES[labels["shape"][cell] - 1] == last.shape
            assert SIZES[labels["size"][cell] - 1] == last.size
            row, column = divmod(int(cell), grid)
            top, left = row * scene.height / grid, column * scene.width / grid
            patch = drawn[int(top) : int(top + scene.height / grid), int(left) : int(left + scene.width / grid)]
            assert patch.any()
        assert owned.any()


def test_every_glyph_labels_a_cell_within_its_box():
    for index in range(200):
        scene = sample_scene(2, "train", index)
        if scene.text is None:
            continue
        labels = scene.cell_labels(16)
        read = {GLYPHS[glyph - 1] for glyph in labels["glyph"] if glyph}
        assert read == set(scene.text.text)
