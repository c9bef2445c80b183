"""Norms against their formulas, and where they round in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.nn.norm import LayerNorm, RMSNorm

EPSILON = 1e-6


def random(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def rms_norm(dtype, dim=64):
    norm = RMSNorm(dim, epsilon=EPSILON, dtype=dtype)
    norm.scale[...] = random(dim, dtype, seed=1)
    return norm


def layer_norm(dtype, dim=64):
    norm = LayerNorm(dim, epsilon=EPSILON, dtype=dtype)
    norm.scale[...], norm.bias[...] = random(dim, dtype, seed=1), random(dim, dtype, seed=2)
    return norm


def wide(x):
    return np.asarray(x, np.float64)


def rms_formula(x):
    x = wide(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def layer_formula(x):
    x = wide(x)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_rms_norm(size):
    norm, x = rms_norm(jnp.float32), size * random((3, 64))
    np.testing.assert_allclose(norm(x), rms_formula(x) * wide(norm.scale[...]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_layer_norm(size):
    norm, x = layer_norm(jnp.float32), size * random((3, 64)) + 2 * size
    expected = layer_formula(x) * wide(norm.scale[...]) + wide(norm.bias[...])
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_in_bfloat16_rounds_before_and_after_the_weight():
    """Bit for bit: the normalised value is rounded, and so is its product with the weight."""
    norm, x = rms_norm(jnp.bfloat16), random((64, 64), jnp.bfloat16)
    ours = norm(x)
    assert ours.dtype == jnp.bfloat16
    rounded_twice = jnp.asarray(rms_formula(x), jnp.bfloat16) * norm.scale[...]
    rounded_once = jnp.asarray(rms_formula(x) * wide(norm.scale[...]), jnp.bfloat16)
    # A float64 value may lie on the other side of a rounding boundary than its float32 approximation, rarely.
    assert (ours != rounded_twice).mean() < 0.002
    assert (ours != rounded_once).mean() > 0.1


def test_layer_norm_in_bfloat16_rounds_once():
    norm, x = layer_norm(jnp.bfloat16), random((64, 64), jnp.bfloat16)
    ours = norm(x)
    assert ours.dtype == jnp.bfloat16
    exact = layer_formula(x) * wide(norm.scale[...]) + wide(norm.bias[...])
    assert (ours != jnp.asarray(exact, jnp.bfloat16)).mean() < 0.002


def test_large_values_do_not_overflow_in_bfloat16():
    x = jnp.full((1, 64), 1e20, jnp.bfloat16)
    np.testing.assert_allclose(wide(rms_norm(jnp.bfloat16)(x)), 0, atol=0)
    assert np.isfinite(wide(rms_norm(jnp.bfloat16)(jnp.full((1, 64), 1e15, jnp.bfloat16)))).all()


@pytest.mark.parametrize("norm", [rms_norm(jnp.float32, 1664), layer_norm(jnp.float32, 1664)], ids=["rms", "layer"])
def test_norms_do_not_depend_on_the_scale_of_their_input(norm):
    x = random((2, 1664))
    np.testing.assert_allclose(norm(x), norm(1000 * x), atol=1e-4)


def test_gradients_at_zero_are_finite():
    for norm in (rms_norm(jnp.float32), layer_norm(jnp.float32)):
        assert np.isfinite(jax.grad(lambda x, norm=norm: norm(x).sum())(jnp.zeros((1, 64)))).all()
