"""The vision tower apart from its goldens: the position tables, the layouts of its weights, what may move what."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.models.qwen_vl import VisionTower
from qwenvl_jax.models.resampler import sincos_positions
from qwenvl_jax.models.vit import bicubic_weights, resize_positions


def make_tower(**changes) -> VisionTower:
    fields = {
        "image_size": 24,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "n_queries": 4,
        "image_start_id": 10,
    }
    config = VisionConfig(**(fields | changes))
    return VisionTower(config, residual_std=0.1, dtype=jnp.float32, rngs=nnx.Rngs(0))


@functools.cache
def tower() -> VisionTower:
    # Compiled as a whole: one by one, the random values of all parameters take longer than all tests here.
    return jax.jit(make_tower)()


def copy_of(module):
    """The same arrays in a module of its own, to be changed."""
    return jax.tree.map(lambda array: array, module)


@jax.jit
def apply(module, x):
    return module(x)


def pixels(count, size=24, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize(("source", "target"), [(16, 32), (16, 4), (16, 17), (2, 7), (1, 3), (32, 16)])
def test_bicubic_weights_sum_to_one(source, target):
    np.testing.assert_allclose(bicubic_weights(source, target).sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_bicubic_weights_of_the_same_size_change_nothing(size):
    np.testing.assert_array_equal(bicubic_weights(size, size), np.eye(size))


@pytest.mark.parametrize(("source", "target"), [(16, 32), (16, 10), (5, 12)])
def test_bicubic_weights_are_symmetric(source, target):
    weights = bicubic_weights(source, target)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_bicubic_weights_have_the_taps_of_a_quarter_step():
    """From 16 to 32 every output lies a quarter step from an input: the four values of the cubic with a = -0.75."""
    a = -0.75

    def near(d):
        return (a + 2) * d**3 - (a + 3) * d**2 + 1

    def far(d):
        return a * (d**3 - 5 * d**2 + 8 * d - 4)

    taps = [far(1.75), near(0.75), near(0.25), far(1.25)]
    np.testing.assert_allclose(bicubic_weights(16, 32)[16, 6:10], taps, atol=1e-6)
    # At the border the taps that fall outside count for the first value.
    np.testing.assert_allclose(bicubic_weights(16, 32)[0, :2], [taps[0] + taps[1] + taps[2], taps[3]], atol=1e-6)


def test_resizing_goes_through_float32():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.bfloat16)
    resized = resize_positions(table, 7)
    assert resized.dtype == jnp.bfloat16
    np.testing.assert_array_equal(resized, resize_positions(table.astype(jnp.float32), 7).astype(jnp.bfloat16))


def test_rows_and_columns_are_resized_alike():
    table = np.random.default_rng(0).standard_normal((4, 4, 8)).astype(np.float32)
    across = resize_positions(jnp.asarray(table.transpose(1, 0, 2).reshape(16, 8)), 6).reshape(6, 6, 8)
    down = resize_positions(jnp.asarray(table.reshape(16, 8)), 6).reshape(6, 6, 8)
    np.testing.assert_allclose(across.transpose(1, 0, 2), down, atol=1e-6)


def test_sincos_positions():
    """Row r * g + c: the first half of the vector is for the column, the second for the row."""
    dim, grid = 32, 5
    table = sincos_positions(dim, grid)
    assert table.dtype == np.float32

    def encoded(position):
        angles = [position / 10000 ** (k / (dim / 4)) for k in range(dim // 4)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    expected = [encoded(column) + encoded(row) for row in range(grid) for column in range(grid)]
    np.testing.assert_allclose(table, expected, atol=1e-6)


def test_patches_are_read_row_by_row():
    """Changing the picture's patch in row 1, column 2 of 3 changes the embedding at 1 * 3 + 2 alone."""
    pictures = pixels(1).repeat(2, axis=0)
    pictures[1, 1, 8:16, 16:24] += 1
    before, after = np.asarray(jax.jit(lambda vit, x: vit.embed(x))(tower().vit, pictures))
    np.testing.assert_array_equal(np.flatnonzero(np.abs(before - after).max(axis=-1)), [5])


def test_a_head_owns_three_neighbouring_parts_of_the_qkv_weight():
    """Zeroing the value columns of head 1 silences the second half of what the heads hand to the output map."""
    block = jax.tree.map(lambda a: a[0], tower().vit.blocks)
    block.out.kernel[...] = jnp.eye(32)
    block.down.kernel[...] = jnp.zeros_like(block.down.kernel[...])
    x = np.random.default_rng(0).standard_normal((1, 9, 32)).astype(np.float32)
    width = 16

    def handed_over():
        return np.asarray(apply(block, x) - x)

    full = handed_over()
    assert np.abs(full[..., width:]).min() > 0
    kernel = np.array(block.qkv.kernel[...])
    kernel.reshape(32, -1)[:, 5 * width :] = 0
    block.qkv.kernel[...] = jnp.asarray(kernel)
    silenced = handed_over()
    np.testing.assert_allclose(silenced[..., width:], 0, atol=1e-6)
    np.testing.assert_allclose(silenced[..., :width], full[..., :width], atol=1e-6)


def test_pictures_do_not_see_each_other():
    model = tower()
    together = np.asarray(apply(model, pixels(3)))
    assert together.shape == (3, 4, 128)
    for row in range(3):
        np.testing.assert_allclose(apply(model, pixels(3)[row : row + 1])[0], together[row], atol=1e-5)


def test_without_position_tables_the_order_of_patches_is_lost():
    """The tower knows where a patch is from the two tables alone."""
    model, picture = copy_of(tower()), pixels(1)
    moved = np.roll(picture, 8, axis=-1)
    assert np.abs(np.asarray(apply(model, picture)) - np.asarray(apply(model, moved))).max() > 1e-3
    for table in (model.vit.positions, model.resampler.positions):
        table[...] = jnp.zeros_like(table[...])
    np.testing.assert_allclose(apply(model, picture), apply(model, moved), atol=1e-5)


def test_the_projection_is_left_out_where_widths_agree():
    agreeing, narrow = (jax.eval_shape(lambda width=width: make_tower(width=width)) for width in (128, 64))
    assert agreeing.resampler.kv is None
    assert narrow.resampler.kv.kernel.shape == (64, 128)
    assert jax.eval_shape(apply, agreeing, pixels(1)).shape == (1, 4, 128)
