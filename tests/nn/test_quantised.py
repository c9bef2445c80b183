"""Quantised linear maps: the grids, the products and their gradients, and that no widened weights pile up."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.nn.linear import Linear
from qwenvl_jax.nn.quantised import NF4_VALUES, Int4Linear, Int8Linear, NF4Linear, QuantisedLinear, dense
from qwenvl_jax.sharding import param_paths

KINDS = {
    "int8": Int8Linear.quantise,
    "int4": lambda linear: Int4Linear.quantise(linear, 32),
    "int4_ordered": lambda linear: shuffled(Int4Linear.quantise(linear, 32, ordered=True)),
    "nf4": NF4Linear.quantise,
    "nf4_single": lambda linear: NF4Linear.quantise(linear, double=False),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def linear(in_dim=96, out=(3, 40), *, bias=True, seed=0, dtype=jnp.float32) -> Linear:
    axes = ("embed", *[None] * (len(out) - 1), "heads")
    map_ = Linear(in_dim, out, axes=axes, bias=bias, std=1.0, dtype=dtype, rngs=nnx.Rngs(seed))
    if bias:
        map_.bias[...] = jnp.asarray(np.random.default_rng(seed).standard_normal(out), dtype)
    return map_


def shuffled(int4: Int4Linear) -> Int4Linear:
    """Another map: the same codes for other rows."""
    int4.order[...] = jax.random.permutation(jax.random.key(3), int4.order[...])
    return int4


def x_of(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def exact_product(x, map_: QuantisedLinear) -> np.ndarray:
    kernel = np.asarray(map_.dequantised(jnp.float32), np.float64)
    y = np.tensordot(np.asarray(x, np.float64), kernel, 1)
    return y if map_.bias is None else y + np.asarray(map_.bias[...], np.float64)


def test_nf4_values_are_those_of_the_paper():
    """QLoRA, appendix E: quantiles of the normal distribution, eight of one sign and seven of the other."""
    last = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantiles = np.vectorize(NormalDist().inv_cdf)
    positive = quantiles(np.linspace(last, 0.5, 9)[:-1])
    negative = -quantiles(np.linspace(last, 0.5, 8)[:-1])
    expected = np.sort([*negative, 0, *positive]) / positive.max()
    np.testing.assert_allclose(NF4_VALUES, expected, atol=2e-7)


def test_int8_is_within_half_a_step():
    float_, quantised = linear(), Int8Linear.quantise(linear())
    error = np.abs(np.asarray(quantised.dequantised(jnp.float32) - float_.kernel[...]))
    largest = np.abs(np.asarray(float_.kernel[...])).max(axis=0)
    assert (error <= largest / 127 / 2 * 1.0001).all()
    assert np.abs(np.asarray(quantised.codes[...])).max(axis=0).min() == 127


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_int4_is_within_half_a_step_of_each_group(group_size):
    """96 rows: even groups, a shorter last one, and one group."""
    float_ = linear()
    quantised = Int4Linear.quantise(float_, group_size)
    size = 96 if group_size == -1 else group_size
    assert quantised.scale.shape == (-(-96 // size), 3, 40)
    kernel = np.asarray(float_.kernel[...])
    error = np.abs(np.asarray(quantised.dequantised(jnp.float32)) - kernel)
    for start in range(0, 96, size):
        step = np.abs(kernel[start : start + size]).max(axis=0) / 7.5
        # Scales are float16, so that 7.5 steps may be 7.5 / 2**11 of a step too long or short.
        assert (error[start : start + size] <= step * (0.5 + 7.6 / 2**11)).all()


def test_nf4_takes_the_nearest_value():
    float_ = linear()
    for double in (False, True):
        quantised = NF4Linear.quantise(float_, double=double)
        kernel, values = np.asarray(float_.kernel[...]), np.array(NF4_VALUES)
        scale = np.repeat(np.asarray(quantised._scales()), 64, axis=0)[:96]
        nearest = values[np.abs(kernel[..., None] / scale[..., None] - values).argmin(-1)] * scale
        np.testing.assert_allclose(quantised.dequantised(jnp.float32), nearest, rtol=1e-6)


def test_double_quantised_scales_are_close():
    wide = linear(64, (300,), bias=False)  # two blocks of scales, the second one short
    single, double = NF4Linear.quantise(wide, double=False), NF4Linear.quantise(wide)
    assert double.step.shape == double.middle.shape == (1, 2)
    scale = np.asarray(single.scale[...])
    step = np.repeat(np.asarray(double.step[...]), 256, axis=1)[:, :300]
    assert (np.abs(np.asarray(double._scales()) - scale) <= step / 2 * 1.001).all()
    assert (np.abs(step) < 0.02 * scale.mean()).all()


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_bits_per_weight(kind, bits):
    """Beside the codes only scales are kept."""
    wide = linear(256, (256,), bias=False)
    quantised = KINDS[kind](wide) if kind != "int4" else Int4Linear.quantise(wide)
    total = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(quantised)) / 256**2
    overhead = {"int8": 32 / 256, "int4": 24 / 128, "nf4": 8 / 64 + 64 / (64 * 256)}[kind]
    assert total == pytest.approx(bits + overhead, abs=1e-6)


@each_kind
def test_zeros_stay_zeros(kind):
    map_ = linear(bias=False)
    map_.kernel[...] = jnp.zeros_like(map_.kernel[...]).at[:, 0, 0].set(1)
    kernel = np.asarray(KINDS[kind](map_).dequantised(jnp.float32))
    assert np.isfinite(kernel).all()
    np.testing.assert_array_equal(kernel[:, 1:], 0)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_called_like_a_linear_map(kind, bias):
    quantised, x = KINDS[kind](linear(bias=bias)), x_of(2, 5, 96)
    y = quantised(x)
    assert y.shape == (2, 5, 3, 40)
    np.testing.assert_allclose(y, exact_product(x, quantised), atol=2e-5)
    assert quantised(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(dense(quantised, jnp.float32)(x), y, atol=2e-5)


@each_kind
def test_gradients_reach_the_input_and_the_bias_alone(kind):
    quantised, x = KINDS[kind](linear()), x_of(2, 5, 96)
    weight = x_of(2, 5, 3, 40)
    assert list(nnx.state(quantised, nnx.Param)) == ["bias"]

    def loss(x, bias, of):
        copy = jax.tree.map(lambda part: part, of)
        copy.bias[...] = bias
        return jnp.sum(copy(x) * weight)

    ours = jax.grad(loss, argnums=(0, 1))(x, quantised.bias[...], quantised)
    theirs = jax.grad(loss, argnums=(0, 1))(x, quantised.bias[...], dense(quantised, jnp.float32))
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=5e-5)
    by_weights = jax.grad(lambda of: loss(x, quantised.bias[...], of), allow_int=True)(quantised)
    floats = [leaf for leaf in jax.tree.leaves(by_weights) if leaf.dtype != jax.dtypes.float0]
    assert all(not np.asarray(leaf).any() for leaf in floats)


def test_float32_products_ask_for_full_precision():
    """Forwards and backwards: GPUs and TPUs would round the operands."""
    quantised, x = KINDS["int4"](linear()), x_of(2, 96)
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(quantised(x) ** 2)))(x))
    assert text.count("dot_general") == 2
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


LAYERS, DIM = 6, 96
LAYER_BYTES = DIM * DIM * 4  # of the widened weights of one layer


def stack(kind: str):
    """Square maps, one after the other."""
    floats = jax.vmap(lambda rngs: Linear(DIM, DIM, axes=("embed", "embed"), dtype=jnp.float32, rngs=rngs))(
        nnx.Rngs(0).split(LAYERS)
    )
    return jax.vmap(KINDS[kind])(floats)


def scanned(stack, x):
    return jax.lax.scan(lambda x, layer: (x + layer(x), None), x, stack)[0]


def temporary_bytes(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_scanned_layers_are_widened_one_at_a_time(kind):
    """Forwards and backwards: the backward pass widens again instead of keeping what the forward pass had."""
    layers, x = stack(kind), x_of(2, DIM)
    assert temporary_bytes(scanned, layers, x) < 2 * LAYER_BYTES
    assert temporary_bytes(jax.grad(lambda x, layers: jnp.sum(scanned(layers, x) ** 2)), x, layers) < 2 * LAYER_BYTES
    listed = x
    for layer in range(LAYERS):
        listed = listed + jax.tree.map(lambda part, layer=layer: part[layer], layers)(listed)
    np.testing.assert_allclose(scanned(layers, x), listed, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_nothing_is_widened_ahead_of_a_loop_over_tokens(kind):
    """Where layers are a list, their weights do not change in the loop, and a compiler would like to prepare them."""
    layers = [jax.tree.map(lambda part, layer=layer: part[layer], stack(kind)) for layer in range(LAYERS)]

    def decode(x, layers):
        def step(x):
            for layer in layers:
                x = x + layer(x)
            return x / jnp.max(jnp.abs(x))

        return jax.lax.while_loop(lambda x: x[0, 0] > 1e-3, step, x)

    assert temporary_bytes(decode, x_of(2, DIM), layers) < 2 * LAYER_BYTES


def test_axes_are_those_of_the_kernel():
    for kind in KINDS:
        quantised = KINDS[kind](linear())
        assert quantised.codes.get_metadata()["axes"] == ("embed", None, "heads"), kind
        assert "bias" in param_paths(quantised)
