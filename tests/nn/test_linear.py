"""Linear maps and embeddings: shapes of fused outputs, dtypes, and full precision of float32 products."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.nn.linear import Embedding, Linear


def linear(out, dtype=jnp.float32, bias=True):
    map_ = Linear(6, out, axes=(None,) * (1 + np.size(out)), bias=bias, std=1.0, dtype=dtype, rngs=nnx.Rngs(0))
    if bias:
        map_.bias[...] = jnp.asarray(np.random.default_rng(1).standard_normal(np.shape(map_.bias[...])), dtype)
    return map_


def test_output_may_have_several_axes():
    """A fused projection [in, 3, N] is the one-axis projection [in, 3 * N] reshaped."""
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    fused = linear((3, 4))
    expected = np.einsum("bti,icn->btcn", x.astype(np.float64), np.asarray(fused.kernel[...], np.float64))
    assert fused(x).shape == (2, 5, 3, 4)
    np.testing.assert_allclose(fused(x), expected + np.asarray(fused.bias[...]), atol=2e-6)


def test_without_bias_zero_stays_zero():
    map_ = linear(4, bias=False)
    assert map_.bias is None
    np.testing.assert_array_equal(map_(jnp.zeros((2, 6))), 0)


def test_the_weights_decide_the_dtype():
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    assert linear(4, jnp.bfloat16)(x).dtype == jnp.bfloat16
    assert linear(4, jnp.float32)(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_float32_products_ask_for_full_precision():
    """On GPUs and TPUs the default would round the operands."""

    def precisions(dtype):
        jaxpr = jax.make_jaxpr(linear(4, dtype))(jnp.zeros((2, 6)))
        return [equation.params["precision"] for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]

    highest = jax.lax.Precision.HIGHEST
    assert precisions(jnp.float32) == [(highest, highest)]
    assert precisions(jnp.bfloat16) == [None]


def test_embedding_looks_rows_up():
    embedding = Embedding(10, 4, axes=("vocab", "embed"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ids = np.array([[0, 9], [3, 3]])
    looked_up = embedding(ids)
    assert looked_up.dtype == jnp.bfloat16
    np.testing.assert_array_equal(looked_up, np.asarray(embedding.table[...])[ids])
