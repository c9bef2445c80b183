"""One step of training is the same whatever the mesh, the number of smaller batches, and what is frozen stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.data.packing import RowShape
from qwenvl_jax.data.pipeline import HostRows
from qwenvl_jax.data.scene_rows import SceneRecipe, SceneRows
from qwenvl_jax.training.build import auxiliary_schedule, build_modules, divide
from qwenvl_jax.training.evaluation import device_batch
from qwenvl_jax.training.optimizer import OptimizerRecipe, make_optimizer
from qwenvl_jax.training.parts import Part, Parts, VisionPart
from qwenvl_jax.training.placement import MeshRecipe, Placement
from qwenvl_jax.training.recipe import NewModel, Recipe
from qwenvl_jax.training.step import TrainState, make_train_step

SHAPE = NewModel(
    layers=1, intermediate_size=64, image_size=32, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2,
    n_queries=4,
)  # fmt: skip
DATA = SceneRecipe(row=RowShape(prefix=32, blocks=1, block=64, targets=32), two_pictures_every=0)
BASE = Recipe(
    new_model=SHAPE,
    data=DATA,
    batch_size=8,
    steps=10,
    optimizer=OptimizerRecipe(name="adamw", learning_rate=0.01, weight_decay=0.0),
)


@dataclasses.dataclass
class Step:
    """What one step did: parameters before and after it by path, metrics, and the state with its shardings."""

    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    metrics: dict[str, float]
    state: TrainState

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """Adam's first moments after one step, a tenth of the clipped gradients."""
        moments = {}
        for where, leaf in jax.tree_util.tree_flatten_with_path(self.state.optimizer)[0]:
            if "mu" in [getattr(key, "name", None) for key in where]:
                moments[where[-1].key] = np.asarray(leaf)
        return moments


def one_step(recipe: Recipe, steps: int = 1) -> Step:
    placement = Placement(recipe.mesh, recipe.batch_size // recipe.accumulate)
    modules, config, vocabulary = build_modules(recipe, placement)
    params, frozen, rebuild = divide(modules, recipe, placement)
    before = {path: np.asarray(value) for path, value in (params | frozen).items()}
    optimizer = make_optimizer(recipe.optimizer, params, recipe.steps, recipe.parts)
    start = jax.device_put(jnp.zeros((), jnp.int32), placement.everywhere)
    state = TrainState(start, params, placement.optimizer(optimizer, params))
    dtype = recipe.dtype if recipe.dtype != "float32" else None
    step = jax.jit(make_train_step(rebuild, optimizer, auxiliary_schedule(recipe), dtype=dtype, remat=recipe.remat))
    rows = SceneRows(recipe.data, str(vocabulary), config, recipe.steps, recipe.batch_size)
    host = HostRows(rows, recipe.accumulate, placement.rows)
    size = recipe.accumulate * len(placement.rows)
    metrics = {}
    for number in range(steps):
        drawn = [host[number * size + i] for i in range(size)]
        state, metrics = step(state, frozen, placement.batches(device_batch(host.collate(drawn))))
    after = {path: np.asarray(value) for path, value in (state.params | frozen).items()}
    return Step(before, after, {name: float(value) for name, value in metrics.items()}, state)


@pytest.fixture(scope="module")
def plain() -> Step:
    return one_step(BASE)


def assert_same_step(found: Step, expected: Step) -> None:
    """The same loss and the same gradients, but for the order in which they were added up."""
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=2e-5), name
    for path, value in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[path], value, atol=2e-5 * np.abs(value).max() + 1e-8, err_msg=path)


def test_smaller_batches_add_up_to_the_large_one(plain):
    """Rows have unlike numbers of targets; each target counts alike all the same."""
    assert_same_step(one_step(dataclasses.replace(BASE, accumulate=4)), plain)


@pytest.mark.parametrize(
    "mesh", [MeshRecipe("fsdp_tensor"), MeshRecipe("tensor", tensor=2, data=4)], ids=["fsdp_tensor", "tensor"]
)
def test_every_mesh_takes_the_same_step(plain, mesh):
    step = one_step(dataclasses.replace(BASE, mesh=mesh))
    assert_same_step(step, plain)
    spread = [path for path, value in step.state.params.items() if not value.sharding.is_fully_replicated]
    assert len(spread) > len(step.state.params) / 4
    # The optimizer's memory lies as the parameters do.
    moments = [leaf for leaf in jax.tree.leaves(step.state.optimizer) if leaf.ndim]
    assert sum(not leaf.sharding.is_fully_replicated for leaf in moments) == 2 * len(spread)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(UserError, match="4 sequences of a batch cannot be divided over 8 shards"):
        Placement(MeshRecipe("fsdp"), 4)


def test_frozen_parts_stay_and_have_no_memory():
    parts = Parts(vision=VisionPart(freeze=True), embeddings=Part(freeze=True), resampler=Part(learning_rate=0.002))
    step = one_step(dataclasses.replace(BASE, parts=parts))
    kept = {path for path in step.before if np.array_equal(step.before[path], step.after[path])}
    frozen = {path for path in step.before if parts.of(path).freeze}
    assert frozen <= kept
    assert "model.visual.projection.kernel" in frozen  # with the ViT, as in the original's fix_vit
    assert not any(path.startswith("model.visual.resampler.") for path in kept)
    assert set(step.gradients) == set(step.state.params) == set(step.before) - frozen
    move = {path: np.abs(step.after[path] - step.before[path]).max() for path in step.gradients}
    assert move["model.visual.resampler.attention.out.kernel"] == pytest.approx(0.002, rel=0.01)  # Adam's first step
    assert move["model.layers.0.up.kernel"] == pytest.approx(0.01, rel=0.01)


def test_everything_frozen_is_refused():
    frozen = Parts(*(Part(freeze=True) for _ in range(4)))
    with pytest.raises(UserError, match="everything is frozen"):
        one_step(dataclasses.replace(BASE, parts=frozen))


@pytest.mark.parametrize("masters", [True, False])
def test_bfloat16_with_and_without_masters(plain, masters):
    step = one_step(dataclasses.replace(BASE, dtype="bfloat16", masters=masters))
    assert step.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=0.01)
    assert {value.dtype for value in step.state.params.values()} == {jnp.dtype("float32" if masters else "bfloat16")}
    assert {value.dtype for value in step.gradients.values()} == {jnp.dtype("float32")}


@pytest.mark.long
def test_muon_learns_on_a_mesh(plain):
    optimizer = OptimizerRecipe(name="muon", learning_rate=0.003)
    recipe = dataclasses.replace(BASE, mesh=MeshRecipe("fsdp_tensor"), optimizer=optimizer)
    assert one_step(recipe, steps=4).metrics["loss"] < plain.metrics["loss"] - 0.3
