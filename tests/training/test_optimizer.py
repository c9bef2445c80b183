"""Muon moves every matrix as a whole: stacked, listed and fused ones alike; Adam has the rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.training.optimizer import OptimizerRecipe, make_optimizer, schedule

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


@pytest.fixture(scope="module")
def updates():
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in MATRICES.items()} | OTHERS
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    # Gradients with a few strong directions, which orthogonalisation evens out and Adam does not.
    grads = {name: jnp.asarray(rng.normal(size=shape) ** 3, jnp.float32) for name, shape in shapes.items()}
    recipe = OptimizerRecipe("muon", 1.0, adam_learning_rate=0.5, schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(recipe, params, 10)
    return optimizer.update(grads, optimizer.init(params), params)[0]


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
