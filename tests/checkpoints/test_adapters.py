"""Where adapters go by the checkpoint's names, what training changes, and the fingerprint of what is under them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.checkpoints.adapters import (
    adapted_sites,
    adapter_tensors,
    add_adapters,
    all_tensors,
    learning_rate_ratios,
    saved_tensors,
    sites,
    trainable_paths,
)
from qwenvl_jax.checkpoints.fingerprint import base_fingerprint, same_base
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.models.qwen_vl import QwenVL, unstack
from qwenvl_jax.nn.lora import LoraRecipe, adapted_linears, merge_adapters
from qwenvl_jax.sharding import make_mesh, param_paths, param_shardings, preset_rules

FOLDER = "qwen-vl-chat-tiny"
VISION = ("in_proj", "out_proj", "c_fc", "kv_proj")


@pytest.fixture(scope="module")
def model(fixtures) -> QwenVL:
    return load_model(fixtures / FOLDER, stacked=True)


@pytest.fixture(scope="module")
def config(model) -> QwenVLConfig:
    return model.config


def test_the_original_targets(config):
    """Four linear maps of every layer and nothing else; "attn.c_proj" is not the MLP's c_proj."""
    found = [site.module for site in adapted_sites(config, LoraRecipe())]
    names = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    assert found == [f"transformer.h.{layer}.{name}" for name in names for layer in range(3)]


def test_names_may_be_whole_last_parts_or_with_stars(config):
    def paths(*targets):
        return {site.path for site in adapted_sites(config, LoraRecipe(targets=targets))}

    assert paths("mlp.c_proj") == {"layers.down", "visual.vit.blocks.down"}
    assert paths("transformer.h.*.mlp.c_proj") == {"layers.down"}
    assert paths("lm_head") == {"lm_head"}
    assert paths("resblocks.*.attn.*") == {"visual.vit.blocks.qkv", "visual.vit.blocks.out"}
    assert paths("out_proj") == {"visual.vit.blocks.out"}, "torch's attention module does not use a wrapped out_proj"
    assert paths("kv_proj") == {"visual.resampler.kv"}


def test_every_linear_map_but_the_resamplers_attention_can_have_one(config):
    assert len({site.path for site in sites(config)}) == 11
    assert "visual.vit.patch_embedding" not in {site.path for site in sites(config)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("c_atn",)}, "c_atn; did you mean c_attn"),
        ({"targets": ("attention.wq",)}, "attention.wq; there are lm_head"),
        ({"modules_to_save": ("wtee",)}, "modules_to_save: the checkpoint has no module wtee"),
        ({"targets": ("attn_pool.attn",)}, "attn_pool.attn"),
        ({"targets": ("h.1.attn.c_attn",)}, "layers 1 of layers.qkv, which is one stack of 3 layers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_name_that_there_is_not_is_an_error(model, fields, message):
    with pytest.raises(UserError, match=message):
        add_adapters(model, LoraRecipe(**fields), nnx.Rngs(0))


def test_modules_trained_whole_get_no_adapter(config):
    recipe = LoraRecipe(targets=("c_attn", "lm_head"), modules_to_save=("lm_head",))
    assert {site.path for site in adapted_sites(config, recipe)} == {"layers.qkv"}
    assert [tensor.name for tensor in saved_tensors(config, recipe)] == ["lm_head.weight"]
    whole = saved_tensors(config, LoraRecipe(modules_to_save=("attn_pool",)))
    assert len(whole) == sum("attn_pool" in tensor.name for tensor in all_tensors(config)) == 11


@pytest.mark.parametrize(
    ("bias", "count"), [("none", 0), ("lora_only", 3 + 2), ("all", None)], ids=["none", "lora_only", "all"]
)
def test_bias_modes(config, bias, count):
    """The bias of c_attn in three layers and of in_proj in two; "all" means every tensor called bias."""
    found = saved_tensors(config, LoraRecipe(targets=("c_attn", "w1", "in_proj"), bias=bias))
    every = [tensor for tensor in all_tensors(config) if tensor.name.endswith(".bias")]
    assert len(found) == (len(every) if count is None else count)
    assert all(tensor.name.endswith(".bias") for tensor in found)


def test_what_is_trained_in_a_stack_and_in_a_list(model):
    recipe = LoraRecipe(rank=2, targets=("c_attn", *VISION), bias="lora_only", modules_to_save=("wte",))
    stacked = trainable_paths(add_adapters(model, recipe, nnx.Rngs(0)), recipe)
    listed = trainable_paths(add_adapters(unstack(model), recipe, nnx.Rngs(0)), recipe)
    language = {"layers.qkv.a", "layers.qkv.b", "layers.qkv.base.bias", "embedding.table"}
    vision = {f"visual.vit.blocks.{name}.{part}" for name in ("qkv", "out", "up") for part in ("a", "b", "base.bias")}
    vision |= {"visual.resampler.kv.a", "visual.resampler.kv.b"}
    assert stacked == language | vision
    in_list = {name.replace("layers.", f"layers.{i}.") for name in language for i in range(3) if "layers" in name}
    assert listed == in_list | {"embedding.table"} | vision


def test_learning_rate_groups(model):
    recipe = LoraRecipe(targets=("c_attn",), loraplus_ratio=16.0, use_dora=True, modules_to_save=("lm_head",))
    ratios = learning_rate_ratios(add_adapters(model, recipe, nnx.Rngs(0)), recipe)
    assert ratios == {
        "layers.qkv.a": 1.0, "layers.qkv.b": 16.0, "layers.qkv.magnitude": 1.0, "lm_head.kernel": 1.0
    }  # fmt: skip


def test_the_model_keeps_its_arrays_and_its_results(model):
    """Nothing is copied, the given model has no adapters afterwards, and a new adapter does nothing."""
    recipe = LoraRecipe(rank=2, targets=("c_attn", "w2", *VISION))
    before = param_paths(model)
    adapted = add_adapters(model, recipe, nnx.Rngs(0))
    assert adapted_linears(model) == {}
    assert len(adapted_linears(adapted)) == 6
    after = param_paths(adapted)
    assert all(
        leaf is after.get(path.replace(".kernel", ".base.kernel"), after.get(path))
        for path, leaf in before.items()
        if ".bias" not in path
    )
    with pytest.raises(UserError, match="already"):
        add_adapters(adapted, recipe, nnx.Rngs(0))
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 128, 128)), jnp.float32)
    np.testing.assert_array_equal(adapted.encode_images(pixels), model.encode_images(pixels))


def test_layers_of_a_list_may_be_chosen(model):
    recipe = LoraRecipe(targets=("h.1.attn.c_attn",))
    adapted = add_adapters(unstack(model), recipe, nnx.Rngs(0))
    assert list(adapted_linears(adapted)) == [("layers", 1, "qkv")]


def test_the_full_size_model_has_the_adapters_of_the_original():
    """Shapes alone: 128 adapted maps from 4096 to 12288, 4096 and twice 11008."""
    visual = VisionConfig(448, 14, 1664, 48, 16, 4.9231, 4096)
    config = QwenVLConfig(151936, 4096, 32, 32, 22016, visual)
    shapes = {tensor.name: tensor.shape for tensor in adapter_tensors(config, LoraRecipe())}
    assert len(shapes) == 2 * 128
    assert shapes["base_model.model.transformer.h.31.attn.c_attn.lora_B.weight"] == (12288, 64)
    assert shapes["base_model.model.transformer.h.0.mlp.w2.lora_A.weight"] == (64, 4096)
    assert sum(a * b for a, b in shapes.values()) == 32 * 64 * (4 * 4096 + 12288 + 4096 + 2 * 11008)


def test_adapters_are_split_like_the_maps_under_them(model):
    """Over eight devices: A like the input, B like the output, stacks unsplit in front."""
    mesh = make_mesh("fsdp_tensor")
    recipe = LoraRecipe(rank=2, targets=("c_attn", "mlp.c_proj"), use_dora=True)
    adapted = add_adapters(model, recipe, nnx.Rngs(0))
    specs = {
        path: s.spec for path, s in param_paths(param_shardings(adapted, mesh, preset_rules("fsdp_tensor"))).items()
    }
    assert tuple(specs["layers.qkv.base.kernel"]) == (None, "fsdp", None, "tensor")
    assert tuple(specs["layers.qkv.a"]) == (None, "fsdp", None)
    assert tuple(specs["layers.qkv.b"]) == (None, None, None, "tensor")
    assert tuple(specs["layers.qkv.magnitude"]) == (None, None, "tensor")
    assert tuple(specs["layers.down.a"]) == (None, "tensor", None)
    assert tuple(specs["layers.down.b"]) == (None, None, "fsdp")


# Fingerprints


def test_a_fingerprint_does_not_see_form_float_type_or_adapter(fixtures, model):
    recipe = LoraRecipe(rank=2)
    own = base_fingerprint(model, recipe)
    assert None not in own.values()
    assert base_fingerprint(unstack(model), recipe) == own
    assert base_fingerprint(load_model(fixtures / FOLDER, dtype="float32"), recipe) == own
    assert base_fingerprint(load_model(fixtures / FOLDER, dtype="float16"), recipe) == own
    assert base_fingerprint(add_adapters(model, recipe, nnx.Rngs(0)), recipe) == own


def test_a_fingerprint_tells_a_merged_model_from_its_base(model):
    recipe = LoraRecipe(rank=2, targets=("w1",))
    adapted = add_adapters(model, recipe, nnx.Rngs(0))
    adapted.layers.up.b[...] = jnp.ones_like(adapted.layers.up.b[...])
    assert not same_base(base_fingerprint(merge_adapters(adapted), recipe), base_fingerprint(model, recipe))


def test_what_the_recipe_trains_does_not_count(model):
    recipe = LoraRecipe(targets=("c_attn",), modules_to_save=("wte", "lm_head"))
    own, plain = base_fingerprint(model, recipe), base_fingerprint(model, LoraRecipe(targets=("c_attn",)))
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.lm_head.kernel = changed.lm_head.kernel.replace(changed.lm_head.kernel[...] + 1)
    assert base_fingerprint(changed, recipe) == own
    assert not same_base(base_fingerprint(changed, LoraRecipe(targets=("c_attn",))), plain)


def test_a_quantised_base_is_known_by_the_rest():
    """What one of two fingerprints does not know is not compared."""
    dense, quantised = {"linear": "1", "other": "2"}, {"linear": None, "other": "2"}
    assert same_base(dense, quantised)
    assert same_base(quantised, dense)
    assert not same_base(quantised, dense | {"other": "3"})
    assert not same_base(dense, dense | {"linear": "3"})
