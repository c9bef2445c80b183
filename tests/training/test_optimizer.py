"""Muon moves every matrix as a whole: stacked, listed and fused ones alike; Adam has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.training.optimizer import OptimizerRecipe, make_optimizer, schedule
from qwenvl_jax.training.parts import Part, Parts, VisionPart

LENGTH, DIM = 2, 16
# Parameter, its shape, and how to see its update as a batch of [in, out] matrices.
MATRICES = {
    "model.layers.up.kernel": ((LENGTH, DIM, 3 * DIM), lambda u: u),
    "model.layers.0.up.kernel": ((DIM, 3 * DIM), lambda u: u[None]),
    "model.layers.qkv.kernel": ((LENGTH, DIM, 3, DIM), lambda u: u.transpose(0, 2, 1, 3).reshape(-1, DIM, DIM)),
    "model.layers.0.qkv.kernel": ((DIM, 3, DIM), lambda u: u.transpose(1, 0, 2)),
    "model.visual.vit.blocks.qkv.kernel": (
        (LENGTH, DIM, 2, 3, DIM // 2),
        lambda u: u.transpose(0, 3, 1, 2, 4).reshape(-1, DIM, DIM),
    ),
    "model.visual.resampler.attention.qkv.kernel": ((DIM, 3, DIM), lambda u: u.transpose(1, 0, 2)),
    "model.visual.projection.kernel": ((DIM, DIM), lambda u: u[None]),
}
OTHERS = {
    "model.embedding.table": (8, DIM),
    "model.lm_head.kernel": (DIM, 8),
    "model.norm_final.scale": (DIM,),
    "auxiliary.linear.kernel": (DIM, 4, 5),
}


def first_update(optimizer, grads, params):
    """Of an optimizer without a memory yet. Compiled as a whole, which takes less long than each of its operations."""
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)


@pytest.fixture(scope="module")
def updates():
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in MATRICES.items()} | OTHERS
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    # Gradients with a few strong directions, which orthogonalisation evens out and Adam does not.
    grads = {name: jnp.asarray(rng.normal(size=shape) ** 3, jnp.float32) for name, shape in shapes.items()}
    recipe = OptimizerRecipe("muon", 1.0, adam_learning_rate=0.5, schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(recipe, params, 10)
    return first_update(optimizer, grads, params)


@pytest.mark.parametrize("name", MATRICES)
def test_all_directions_of_a_matrix_move_alike(updates, name):
    for matrix in MATRICES[name][1](np.asarray(updates[name])):
        values = np.linalg.svd(matrix / max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5, compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1, but for the very smallest ones.
        assert np.median(values) > 0.65
        assert values.max() < 1.35


@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_moves_by_adam(updates, name):
    sizes = np.abs(np.asarray(updates[name]))  # Adam's first step has one size, whatever the gradient's
    np.testing.assert_allclose(np.median(sizes), sizes.max(), rtol=1e-3)  # epsilon dampens the smallest


def test_schedules_warm_up_and_end_where_they_should():
    recipe = OptimizerRecipe(learning_rate=1.0, warmup_steps=10, final_share=0.1)
    rate = schedule(recipe, 1.0, 100)
    assert [round(float(rate(step)), 3) for step in (0, 9, 10, 55, 100)] == [0.1, 0.91, 1.0, 0.55, 0.1]


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(UserError, match="final_share"):
        OptimizerRecipe(final_share=2)


def test_warm_up_stable_decay():
    rate = schedule(OptimizerRecipe(learning_rate=1.0, schedule="wsd", warmup_steps=10, decay_share=0.2), 1.0, 100)
    assert [round(float(rate(step)), 3) for step in (0, 10, 79, 80, 90, 100)] == [0.1, 1.0, 1.0, 1.0, 0.5, 0.0]


def test_adafactor_keeps_rows_and_columns_and_finds_a_minimum():
    recipe = OptimizerRecipe("adafactor", 0.05, weight_decay=0.0)
    goal = jnp.asarray(np.random.default_rng(0).normal(size=(256, 128)), jnp.float32)
    params = {"model.layers.up.kernel": jnp.zeros((256, 128))}
    optimizer = make_optimizer(recipe, params, 200)
    memory = optimizer.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(memory)) < 2 * (256 + 128)

    def step(_, carry):
        params, memory = carry
        grads = {name: value - goal for name, value in params.items()}
        updates, memory = optimizer.update(grads, memory, params)
        return {name: value + updates[name] for name, value in params.items()}, memory

    params, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, 200, step, carry))((params, memory))
    np.testing.assert_allclose(params["model.layers.up.kernel"], goal, atol=0.05)


def test_a_part_with_its_own_rate_moves_by_it():
    params = {"model.layers.up.kernel": jnp.ones((16, 16)), "model.embedding.table": jnp.ones((16, 16))}
    parts = Parts(language=Part(learning_rate=0.2), embeddings=Part(learning_rate=0.03))
    recipe = OptimizerRecipe("muon", 0.1, adam_learning_rate=0.01, schedule="constant", weight_decay=0.0)
    grads = {name: jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32) for name in params}
    moves = []
    for chosen in (None, parts):
        optimizer = make_optimizer(recipe, params, 10, chosen)
        moves.append(first_update(optimizer, grads, params))
    for name, ratio in (("model.layers.up.kernel", 2), ("model.embedding.table", 3)):
        np.testing.assert_allclose(moves[1][name], ratio * moves[0][name], rtol=1e-5)


def test_warm_up_as_a_share_of_the_steps():
    by_share = schedule(OptimizerRecipe(learning_rate=1.0, warmup_share=0.03), 1.0, 250)
    by_steps = schedule(OptimizerRecipe(learning_rate=1.0, warmup_steps=8), 1.0, 250)  # rounded up
    assert [float(by_share(step)) for step in (0, 7, 8, 200)] == [float(by_steps(step)) for step in (0, 7, 8, 200)]
    with pytest.raises(UserError, match="give one of them"):
        OptimizerRecipe(warmup_steps=3, warmup_share=0.1)


@pytest.mark.parametrize("stacked", [True, False])
def test_deeper_layers_of_the_vision_transformer_move_less(stacked):
    """Two blocks: the rate falls by the factor with every layer below the top, the embedding's once more."""
    blocks = {"model.visual.vit.blocks.up.kernel": jnp.ones((2, 8, 8))}
    if not stacked:
        blocks = {f"model.visual.vit.blocks.{i}.up.kernel": jnp.ones((8, 8)) for i in range(2)}
    params = blocks | {
        "model.visual.vit.positions": jnp.ones((4, 8)),
        "model.visual.projection.kernel": jnp.ones((8, 8)),
        "model.layers.0.up.kernel": jnp.ones((8, 8)),
    }
    grads = {name: jnp.ones_like(value) for name, value in params.items()}
    recipe = OptimizerRecipe("adamw", 0.1, schedule="constant", weight_decay=0.0)
    moves = []
    for vision in (VisionPart(), VisionPart(layer_decay=0.5)):
        optimizer = make_optimizer(recipe, params, 10, Parts(vision=vision))
        moves.append(first_update(optimizer, grads, params))
    ratios = {name: np.asarray(moves[1][name] / moves[0][name]) for name in params}
    of_blocks = [r for name, value in ratios.items() if "blocks" in name for r in (value if stacked else [value])]
    for ratio, expected in zip(of_blocks, (0.25, 0.5), strict=True):
        np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    np.testing.assert_allclose(ratios["model.visual.vit.positions"], 0.125, rtol=1e-6)
    np.testing.assert_allclose(ratios["model.visual.projection.kernel"], 1)
    np.testing.assert_allclose(ratios["model.layers.0.up.kernel"], 1)


def test_a_layer_decay_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"parts\.vision\.layer_decay is 1\.5"):
        VisionPart(layer_decay=1.5)
