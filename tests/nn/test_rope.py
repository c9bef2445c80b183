"""Rotary positions, dynamic NTK and logn against their formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.nn.rope import inverse_frequencies, logn_scale, ntk_alpha, rotary_table, rotate


@pytest.mark.parametrize("seq_length", [16, 100, 2048, 8192])
def test_ntk_alpha_is_the_formula_with_logarithms(seq_length):
    """max(2 ** ceil(log2(K / seq_length) + 1) - 1, 1) for every length that the original can take."""
    lengths = range(1, 32769)
    expected = [max(2 ** math.ceil(math.log2(k / seq_length) + 1) - 1, 1) for k in lengths]
    assert [ntk_alpha(k, seq_length) for k in lengths] == expected


def test_ntk_alpha_changes_after_each_doubling():
    assert [ntk_alpha(k, 2048) for k in (0, 1, 2048, 2049, 4096, 4097, 8192, 8193, 16384, 16385)] == [
        *(1, 1, 1),
        *(3, 3),
        *(7, 7),
        *(15, 15),
        31,
    ]


@pytest.mark.parametrize("alpha", [1, 3, 15])
def test_inverse_frequencies(alpha):
    base = 10000.0 * alpha ** (128 / 126)
    expected = [base ** (-2 * j / 128) for j in range(64)]
    ours = inverse_frequencies(128, 10000.0, alpha)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_ntk_turns_the_slowest_pair_alpha_times_slower():
    """The reason for the exponent dim / (dim - 2): the longest wave is stretched by alpha, the shortest not at all."""
    plain, scaled = inverse_frequencies(128, 10000.0), inverse_frequencies(128, 10000.0, 7)
    np.testing.assert_allclose(plain[[0, -1]] / scaled[[0, -1]], [1, 7], rtol=1e-5)


def as_complex(x, angles):
    """Rotation as multiplication: dimension j is the real part, j + half the imaginary part."""
    half = angles.shape[-1]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotation_is_complex_multiplication(rotated):
    """For the whole head, and for the first half of it (rotary_pct below 1)."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2], [5, 70, 700]])
    frequencies = np.stack([inverse_frequencies(rotated, 10000.0), inverse_frequencies(rotated, 10000.0, 3)])
    ours = rotate(x, *rotary_table(jnp.asarray(positions), jnp.asarray(frequencies)))
    angles = positions[..., None].astype(np.float64) * frequencies[:, None, :]
    np.testing.assert_allclose(ours, as_complex(x.astype(np.float64), angles[:, :, None]), atol=3e-5)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=25, deadline=None)
def test_scores_depend_on_distance_alone(first, second, shift):
    generator = np.random.default_rng(1)
    q, k = generator.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)
    frequencies = jnp.asarray(inverse_frequencies(16, 10000.0))[None]

    def score(query_position, key_position):
        turned = [
            rotate(x, *rotary_table(jnp.array([[position]]), frequencies))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=2e-3)


def test_rotation_is_computed_in_float32_and_cast_back():
    x = np.random.default_rng(2).standard_normal((1, 4, 1, 16)).astype(jnp.bfloat16)
    table = rotary_table(jnp.array([[1000, 1001, 1002, 1003]]), jnp.asarray(inverse_frequencies(16, 10000.0))[None])
    ours = rotate(x, *table)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, rotate(x.astype(np.float32), *table).astype(jnp.bfloat16))


@pytest.mark.parametrize("seq_length", [16, 2048])
def test_logn_scale(seq_length):
    """log(p + 1) / log(seq_length), but never below 1, for all positions that the original has a table for."""
    expected = [max(math.log(count, seq_length), 1.0) for count in range(1, 32768)]
    np.testing.assert_allclose(logn_scale(jnp.arange(32767), seq_length), expected, rtol=3e-7)


def test_logn_starts_after_the_training_length():
    factors = logn_scale(jnp.array([0, 2047, 2048, 4095]), 2048)
    assert factors.dtype == jnp.float32
    np.testing.assert_array_equal(factors[:2], 1.0)
    assert factors[2] > 1
    assert factors[3] == pytest.approx(1 + 1 / 11, rel=1e-6)
