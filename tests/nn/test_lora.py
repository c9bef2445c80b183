"""Low-rank adapters on single linear maps: the formulas, stacks, dropout, and bases that are not `Linear`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.config import UserError
from qwenvl_jax.nn.linear import Linear
from qwenvl_jax.nn.lora import AdaptedLinear, LoraRecipe, adapted_linears, merge_adapters, with_dropout

AXES = ("embed", None, "heads")
RANK, WIDTH, OUT = 2, 6, (3, 4)


class Halves(nnx.Module):
    """A linear map that keeps its weights its own way: twice the value, in integers of sixteenths."""

    def __init__(self, linear: Linear):
        self.codes = nnx.Param(jnp.round(linear.kernel[...] * 32).astype(jnp.int32))
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bi,ijk->bjk", x, self.codes[...] / 32, precision="highest") + self.bias[...]


def linear(dtype=jnp.float32) -> Linear:
    """On a grid of 1/32, which `Halves` and bfloat16 hold exactly."""
    made = Linear(WIDTH, OUT, axes=AXES, bias=True, std=1.0, dtype=dtype, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    made.kernel[...] = jnp.asarray(random.integers(-48, 48, (WIDTH, *OUT)) / 32, dtype)
    made.bias[...] = jnp.asarray(random.integers(-48, 48, OUT) / 32, dtype)
    return made


def adapted(recipe: LoraRecipe, base=None) -> AdaptedLinear:
    """With a B (and magnitude) as if it were trained."""
    made = AdaptedLinear(base or linear(), (WIDTH, *OUT), axes=AXES, recipe=recipe, rngs=nnx.Rngs(3))
    random = np.random.default_rng(2)
    made.b[...] = jnp.asarray(random.standard_normal((RANK, *OUT)), jnp.float32)
    if made.magnitude is not None:
        made.magnitude[...] *= jnp.asarray(random.uniform(0.5, 2, OUT), jnp.float32)
    return made


def recipe(**fields) -> LoraRecipe:
    return LoraRecipe(**{"rank": RANK, "alpha": 3.0, "dropout": 0.0} | fields)


def inputs(dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, WIDTH)).astype(dtype)


def dense(layer: AdaptedLinear, scale: float) -> np.ndarray:
    """The weights that the adapter stands for, in float64, straight from the definition."""
    a, b, kernel = (np.asarray(value[...], np.float64) for value in (layer.a, layer.b, linear().kernel))
    weights = kernel + scale * np.einsum("ir,rjk->ijk", a, b)
    if layer.magnitude is None:
        return weights
    return np.asarray(layer.magnitude[...], np.float64) * weights / np.sqrt((weights**2).sum(0))


FORMS = {
    "plain": ({}, 3.0 / RANK),
    "rslora": ({"use_rslora": True}, 3.0 / math.sqrt(RANK)),
    "dora": ({"use_dora": True}, 3.0 / RANK),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_that_of_the_summed_weights(form):
    fields, scale = FORMS[form]
    layer = adapted(recipe(**fields))
    weights, bias = dense(layer, scale), np.asarray(linear().bias[...], np.float64)
    expected = np.einsum("bi,ijk->bjk", inputs().astype(np.float64), weights) + bias
    np.testing.assert_allclose(layer(inputs()), expected, atol=1e-5)
    np.testing.assert_allclose(layer.merged().kernel[...], weights, atol=1e-6)
    np.testing.assert_allclose(layer.merged()(inputs()), expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_adapter_changes_nothing(form):
    layer = AdaptedLinear(linear(), (WIDTH, *OUT), axes=AXES, recipe=recipe(**FORMS[form][0]), rngs=nnx.Rngs(3))
    assert float(jnp.abs(layer.a[...]).max()) > 0
    np.testing.assert_allclose(layer(inputs()), linear()(inputs()), atol=1e-5 if form == "dora" else 0)


@pytest.mark.parametrize("form", FORMS)
def test_any_base_that_is_called_like_a_linear_map(form):
    """The same numbers on weights in another form; into these nothing can be merged."""
    fields, _ = FORMS[form]
    layer = adapted(recipe(**fields), Halves(linear()))
    np.testing.assert_allclose(layer(inputs()), adapted(recipe(**fields))(inputs()), atol=1e-5)
    with pytest.raises(UserError, match="quantised"):
        layer.merged()


def test_a_bfloat16_base_keeps_its_dtype_and_the_adapter_float32():
    layer = adapted(recipe(), linear(jnp.bfloat16))
    assert layer(inputs()).dtype == jnp.bfloat16
    assert {layer.a[...].dtype, layer.b[...].dtype} == {jnp.dtype("float32")}
    assert layer.merged().kernel[...].dtype == jnp.bfloat16
    np.testing.assert_allclose(layer(inputs()).astype(jnp.float32), adapted(recipe())(inputs()), atol=0.1)


def test_float32_products_ask_for_full_precision():
    jaxpr = jax.make_jaxpr(adapted(recipe()))(jnp.zeros((2, WIDTH)))
    found = [e.params["precision"] for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert found == [(jax.lax.Precision.HIGHEST,) * 2] * 3


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_scanned_layer_by_layer(form):
    """Layers in front of everything: initialised, scanned and merged as each of them alone."""
    bases = [linear(), linear()]
    bases[1].kernel[...] *= 0.5
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bases)
    made = AdaptedLinear(stack, (WIDTH, *OUT), axes=AXES, recipe=recipe(**FORMS[form][0]), stack=2, rngs=nnx.Rngs(0))
    if made.magnitude is not None:
        expected = np.stack([np.sqrt((np.asarray(base.kernel[...]) ** 2).sum(0)) for base in bases])
        np.testing.assert_allclose(made.magnitude[...], expected, rtol=1e-6)
    made.b[...] = jnp.asarray(np.random.default_rng(4).standard_normal((2, RANK, *OUT)), jnp.float32)
    results = jax.lax.scan(lambda x, layer: (x, layer(x)), jnp.asarray(inputs()), made)[1]
    merged = made.merged()
    for index in range(2):
        alone = jax.tree.map(lambda leaf, index=index: leaf[index], made)
        np.testing.assert_allclose(results[index], alone(inputs()), atol=2e-6)
        np.testing.assert_allclose(merged.kernel[index], alone.merged().kernel[...], atol=1e-6)


class TwoLayers(nnx.Module):
    def __init__(self):
        self.alone = adapted(recipe(dropout=0.5))
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), self.alone)
        self.layers = stack


def test_dropout_is_for_training_and_by_key():
    model, x = TwoLayers(), jnp.asarray(inputs())
    quiet = model.alone(x)
    trained = with_dropout(model, jax.random.key(0))
    assert model.alone.key is None, "the model that was given has changed"
    np.testing.assert_array_equal(trained.alone(x), with_dropout(model, jax.random.key(0)).alone(x))
    assert not np.array_equal(trained.alone(x), quiet)
    assert not np.array_equal(trained.alone(x), with_dropout(model, jax.random.key(1)).alone(x))
    results = jax.lax.scan(lambda x, layer: (x, layer(x)), x, trained.layers)[1]
    assert not np.array_equal(results[0], results[1]), "both layers of the stack dropped the same"
    assert not np.array_equal(results[0], trained.alone(x))


def test_dropout_keeps_the_mean():
    """Over many keys the mean is the result without dropout; only the adapter's part varies."""
    layer, x = TwoLayers(), jnp.asarray(inputs())
    many = jax.vmap(lambda key: with_dropout(layer, key).alone(x))(jax.random.split(jax.random.key(0), 4000))
    error = np.asarray(many.std(0)) / math.sqrt(4000)
    assert np.all(np.abs(np.asarray(many.mean(0)) - layer.alone(x)) < 5 * error + 1e-6)


def test_dora_takes_its_norm_as_a_constant():
    """The gradient of the magnitude is that of m * V / |V| with |V| held fixed."""
    layer, x = adapted(recipe(use_dora=True)), jnp.asarray(inputs())
    grads = jax.grad(lambda layer: layer(x).sum())(layer)
    weights = np.asarray(linear().kernel[...]) + 1.5 * np.einsum("ir,rjk->ijk", layer.a[...], layer.b[...])
    norm = np.sqrt((weights**2).sum(0))
    np.testing.assert_allclose(grads.magnitude[...], np.einsum("bi,ijk->jk", x, weights) / norm, atol=1e-4)
    strength = np.asarray(layer.magnitude[...]) / norm
    expected = 1.5 * np.einsum("bi,ir,jk->rjk", x, layer.a[...], strength)
    np.testing.assert_allclose(grads.b[...], expected, atol=1e-4)


def test_merging_a_model_replaces_every_adapter():
    model = TwoLayers()
    merged = merge_adapters(model)
    assert len(adapted_linears(model)) == 2
    assert adapted_linears(merged) == {}
    np.testing.assert_allclose(merged.alone(inputs()), model.alone(inputs()), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"bias": "some"}, {"targets": ()}, {"loraplus_ratio": 0.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_wrong_field_is_named(fields):
    with pytest.raises(UserError, match=f"lora: {next(iter(fields))}"):
        LoraRecipe(**fields)


def test_base_models_train_embedding_and_head():
    assert LoraRecipe().for_checkpoint({"chat_format": "raw"}).modules_to_save == ("wte", "lm_head")
    assert LoraRecipe().for_checkpoint({"chat_format": "chatml"}).modules_to_save == ()
    assert LoraRecipe(modules_to_save=("wte",)).for_checkpoint({"chat_format": "raw"}).modules_to_save == ("wte",)
