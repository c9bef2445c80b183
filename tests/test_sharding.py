"""Sharding rules and meshes, and that a model on eight devices computes what it computes on one."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import qwenvl_jax
from qwenvl_jax.checkpoints.folder import read_config
from qwenvl_jax.checkpoints.huggingface import abstract_model, load_model
from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    PRESETS,
    ShardingRules,
    batch_sharding,
    make_mesh,
    param_paths,
    param_shardings,
    preset_rules,
    split_layer,
)

ON_MESHES = {
    "fsdp": {"embedding.table": P(None, "fsdp"), "layers.qkv.kernel": P(None, "fsdp", None, None)},
    "tensor": {"embedding.table": P("tensor", None), "layers.qkv.kernel": P(None, None, None, "tensor")},
    "fsdp_tensor": {
        "embedding.table": P("tensor", "fsdp"),
        "layers.qkv.kernel": P(None, "fsdp", None, "tensor"),
        "layers.qkv.bias": P(None, None, "tensor"),
        "layers.down.kernel": P(None, "tensor", "fsdp"),
        "layers.norm_mlp.scale": P(None, None),
        "lm_head.kernel": P("fsdp", "tensor"),
        "visual.resampler.kv.kernel": P(None, "fsdp"),
        "visual.vit.blocks.qkv.kernel": P(None, None, None, None, None),  # three heads fit no axis of two or four
        "visual.vit.blocks.up.kernel": P(None, None, ("tensor", "fsdp")),
    },
}

# Of the logits' root mean square. The largest difference says less: some tokens of these random prompts magnify
# rounding a hundred times, so that one device alone lies up to 1.3e-4 off float64 arithmetic, and so does every mesh.
ROUNDING = 5e-6
LARGEST = 2e-4  # of a single logit; two runs that are both right were seen 6e-5 apart


def logits(model, pixels, sharding=None):
    """Float32 logits [8, 300, V] of eight prompts, two with a picture."""
    config = model.config
    queries, start = config.visual.n_queries, config.visual.image_start_id
    ids = np.random.default_rng(0).integers(0, 1200, (8, 300))
    slots = np.full(ids.shape, -1)
    for image, row in enumerate((1, 2)):
        ids[row, 10], ids[row, 11 + queries] = start, start + 1
        slots[row, 11 : 11 + queries] = image * queries + np.arange(queries)
    positions = np.broadcast_to(np.arange(300), ids.shape)

    @jax.jit
    def run(model, ids, slots, positions, pixels):
        x = model.embed(ids, model.encode_images(pixels), slots)
        mask = causal_mask(jnp.ones(ids.shape, bool))
        return model.logits(model(x, model.context(mask, positions, frequencies(config, [300] * 8)))[0])

    batch = jax.device_put((ids, slots, positions), sharding)
    return np.asarray(run(model, *batch, pixels))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 3, 128, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(fixtures, pixels) -> np.ndarray:
    return logits(load_model(fixtures / "qwen-vl-chat-tiny", dtype="float32", stacked=True), pixels)


@pytest.mark.parametrize(
    ("preset", "stacked"),
    [("single", True), ("fsdp", True), ("tensor", True), ("fsdp_tensor", True), ("fsdp_tensor", False)],
)
def test_a_model_on_a_mesh_computes_the_same(fixtures, pixels, expected, preset, stacked):
    mesh = make_mesh(preset)
    folder = fixtures / "qwen-vl-chat-tiny"
    model = load_model(folder, dtype="float32", mesh=mesh, rules=preset_rules(preset), stacked=stacked)
    for path, leaf in param_paths(model).items():
        base, layer = split_layer(path)
        assert leaf.sharding.mesh == mesh
        wanted = ON_MESHES.get(preset, {}).get(base)
        if wanted is not None:
            assert leaf.sharding.spec == (wanted if layer is None else P(*wanted[1:])), path
            split = sum(len((axes,) if isinstance(axes, str) else axes or ()) for axes in wanted)
            assert leaf.addressable_shards[0].data.size < leaf.size or not split
    difference = logits(model, pixels, batch_sharding(mesh, preset_rules(preset))) - expected
    assert root_mean_square(difference) < ROUNDING * root_mean_square(expected)
    assert np.abs(difference).max() < LARGEST


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def test_each_device_holds_its_part_only(fixtures):
    mesh = make_mesh("fsdp")
    model = load_model(fixtures / "qwen-vl-chat-tiny", mesh=mesh, rules=preset_rules("fsdp"))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    shards = [shard for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards]
    for device in mesh.devices.flat:
        held = [shard.data.nbytes for shard in shards if shard.device == device]
        assert sum(held) < total / 5  # an eighth, and the small parameters that are copied


class Parts(nnx.Module):
    def __init__(self, **parts):
        for name, (shape, axes) in parts.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape), axes=axes))


def specs(model, mesh, rules) -> dict:
    return {path: sharding.spec for path, sharding in param_paths(param_shardings(model, mesh, rules)).items()}


AUTO = (AxisType.Auto,) * 3  # newer versions of JAX make explicit axes by default
MESH = AbstractMesh((1, 4, 2), MESH_AXES, axis_types=AUTO)


def test_a_dimension_that_does_not_divide_is_split_less():
    rules = ShardingRules(heads=("tensor", "fsdp"))
    for size, part in [(16, ("tensor", "fsdp")), (12, "tensor"), (6, "tensor"), (7, None), (0, ("tensor", "fsdp"))]:
        assert rules.spec(("heads",), (size,), MESH) == P(part)


def test_stacked_layers_come_before_the_named_axes():
    model = Parts(one=((8, 6), ("embed", "mlp")), stack=((3, 8, 6), ("embed", "mlp")))
    assert specs(model, MESH, DEFAULT_RULES) == {"one": P("fsdp", "tensor"), "stack": P(None, "fsdp", "tensor")}


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    rules = ShardingRules(embed="fsdp", vocab="fsdp")
    model = Parts(table=((8, 8), ("vocab", "embed")))
    with pytest.raises(UserError, match="'vocab' and 'embed' of table are both on mesh axis 'fsdp'"):
        param_shardings(model, MESH, rules)


def test_unknown_axes_are_errors():
    with pytest.raises(UserError, match="x has a logical axis 'colour'"):
        param_shardings(Parts(x=((8,), ("colour",))), MESH, DEFAULT_RULES)
    with pytest.raises(UserError, match="embed = 'model', but the mesh has the axes data, fsdp, tensor"):
        param_shardings(Parts(x=((8,), ("embed",))), MESH, ShardingRules(embed="model"))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_shard_a_full_size_model_without_collision(preset):
    config = read_config(Path(qwenvl_jax.__file__).parent / "assets" / "known" / "Qwen" / "Qwen-VL-Chat")
    sizes = {"single": (1, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8)}.get(preset, (1, 4, 2))
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=AUTO)
    model = abstract_model(config, stacked=True)
    shardings = param_paths(param_shardings(model, mesh, preset_rules(preset)))
    largest = sum(np.prod(shardings[path].shard_shape(leaf.shape)) for path, leaf in param_paths(model).items())
    assert largest < 1.03 * 9_656_935_168 / mesh.size


def test_param_paths_follow_the_order_of_the_leaves(fixtures):
    model = load_model(fixtures / "qwen-vl-chat-tiny")
    assert list(map(id, param_paths(model).values())) == list(map(id, jax.tree.leaves(model)))
    assert "layers.2.qkv.kernel" in param_paths(model)
    assert split_layer("layers.2.qkv.kernel") == ("layers.qkv.kernel", 2)
    assert split_layer("visual.vit.blocks.qkv.kernel") == ("visual.vit.blocks.qkv.kernel", None)


@pytest.mark.parametrize(
    ("preset", "options", "shape"),
    [
        ("single", {}, (1, 1, 1)),
        ("fsdp", {}, (1, 8, 1)),
        ("fsdp", {"data": 2}, (2, 4, 1)),
        ("fsdp_tensor", {}, (1, 4, 2)),
        ("fsdp_tensor", {"tensor": 4}, (1, 2, 4)),
        ("fsdp_tensor", {"data": 2, "tensor": 4}, (2, 1, 4)),
        ("tensor", {}, (1, 1, 8)),
        ("tensor", {"data": 4}, (4, 1, 2)),
    ],
)
def test_make_mesh(preset, options, shape):
    mesh = make_mesh(preset, **options)
    assert tuple(mesh.shape[axis] for axis in MESH_AXES) == shape


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("fsdp", {"data": 3}),
        ("fsdp", {"data": 0}),
        ("fsdp", {"tensor": 2}),
        ("fsdp_tensor", {"tensor": 3}),
        ("tensor", {"tensor": 2}),
        ("single", {"data": 2}),
        ("zero3", {}),
    ],
)
def test_make_mesh_refuses_what_does_not_fit(preset, options):
    with pytest.raises(UserError):
        make_mesh(preset, **options)


def test_a_mesh_with_explicit_axes_is_refused():
    with pytest.raises(UserError, match="must be of type Auto"):
        param_shardings(Parts(x=((8,), ("embed",))), jax.make_mesh((1, 8, 1), MESH_AXES), DEFAULT_RULES)


def test_rules_are_values():
    assert dataclasses.replace(DEFAULT_RULES, vocab=None) != DEFAULT_RULES
    assert hash(preset_rules("fsdp")) == hash(dataclasses.replace(preset_rules("fsdp")))
