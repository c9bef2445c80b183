"""Banks of adapters on single linear maps: each row gets what its own adapter alone gives, and row of none the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.nn.adapter_bank import BankedLinear, banked_linears, with_chosen
from qwenvl_jax.nn.linear import Linear
from qwenvl_jax.nn.lora import AdaptedLinear, LoraRecipe
from qwenvl_jax.nn.quantised import Int8Linear

AXES = ("embed", None, "heads")
WIDTH, OUT = 6, (3, 4)
RANKS = (2, 5, 1)
ROWS = [2, 0, 3, 1, 2]


def linear(dtype=jnp.float32) -> Linear:
    return Linear(WIDTH, OUT, axes=AXES, bias=True, std=1.0, dtype=dtype, rngs=nnx.Rngs(0))


def alone(base) -> list[AdaptedLinear]:
    """Three adapters of different ranks and scales."""
    random = np.random.default_rng(0)
    made = []
    for rank in RANKS:
        recipe = LoraRecipe(rank=rank, alpha=3.0, use_rslora=rank == 5)
        layer = AdaptedLinear(base, (WIDTH, *OUT), axes=AXES, recipe=recipe, rngs=nnx.Rngs(rank))
        layer.b[...] = jnp.asarray(random.standard_normal((rank, *OUT)), jnp.float32)
        made.append(layer)
    return made


def bank(base) -> BankedLinear:
    a, b = np.zeros((WIDTH, 3, max(RANKS)), np.float32), np.zeros((3, max(RANKS), *OUT), np.float32)
    for number, layer in enumerate(alone(base)):
        a[:, number, : RANKS[number]], b[number, : RANKS[number]] = layer.a[...], layer.scale * layer.b[...]
    return BankedLinear(base, nnx.Param(jnp.asarray(a)), nnx.Param(jnp.asarray(b)))


def inputs(*front: int, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((*front, WIDTH)), dtype)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("front", [(5,), (5, 7)], ids=str)
def test_each_row_has_its_own(form, front):
    dtype = jnp.dtype("bfloat16" if form == "bfloat16" else "float32")
    base = Int8Linear.quantise(linear()) if form == "int8" else linear(dtype)
    x, banked, layers = inputs(*front, dtype=dtype), bank(base), [base, *alone(base)]
    together = jax.jit(lambda banked, rows: with_chosen(banked, rows)(x))(banked, np.array(ROWS, np.int32))
    assert together.dtype == dtype
    for place, number in enumerate(ROWS):
        expected = layers[number](x)[place].astype(np.float32)
        atol = 0.1 if form == "bfloat16" else 1e-5 if number else 0
        np.testing.assert_allclose(together[place].astype(np.float32), expected, atol=0 if number == 0 else atol)
        row = with_chosen(banked, np.array([number], np.int32))(x)  # one number for all rows
        np.testing.assert_allclose(row[place].astype(np.float32), expected, atol=0 if number == 0 else atol)


def test_without_a_choice_it_is_the_base():
    banked = bank(linear())
    np.testing.assert_array_equal(banked(inputs(5)), linear()(inputs(5)))
    assert with_chosen(banked, None) is banked
    with_chosen(banked, np.array([1], np.int32))
    assert banked.chosen is None, "the bank that was given has changed"


class Stack(nnx.Module):
    def __init__(self):
        self.layers = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), bank(linear()))


def test_a_stack_is_scanned_layer_by_layer():
    model, x, rows = Stack(), inputs(5), np.array(ROWS, np.int32)
    assert list(banked_linears(model)) == [("layers",)]
    results = jax.lax.scan(lambda x, layer: (x, layer(x)), x, with_chosen(model, rows).layers)[1]
    for index in range(2):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], model.layers)
        np.testing.assert_allclose(results[index], with_chosen(layer, rows)(x), atol=1e-6)
