"""The weight table of Qwen-VL: complete, bijective, and the shapes of the released checkpoint."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.checkpoints.huggingface import abstract_model, checkpoint_tensors
from qwenvl_jax.checkpoints.qwen_vl import is_harmless_extra
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.sharding import param_paths, split_layer

RELEASED = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def test_the_released_model_has_exactly_the_tensors_of_its_checkpoint(golden):
    """By shape only: 853 names, 9,656,935,168 values."""
    expected = {
        name: tuple(shape) for name, shape in json.loads((golden / "param_shapes_full.json").read_text()).items()
    }
    tensors = checkpoint_tensors(QwenVLConfig.from_hf(RELEASED))
    assert {tensor.name: tensor.shape for tensor in tensors} == expected
    assert len(tensors) == len(expected) == 853
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 9_656_935_168


@st.composite
def configs(draw) -> QwenVLConfig:
    heads = draw(st.sampled_from([1, 2, 4]))
    hidden = 128 * draw(st.integers(1, 2))
    vit_heads = draw(st.integers(1, 3))
    # A width equal to the hidden size leaves out one tensor.
    width = hidden if vit_heads == 2 and draw(st.booleans()) else vit_heads * draw(st.integers(1, 5))
    patch = draw(st.integers(1, 3))
    return QwenVLConfig.from_hf(
        {
            "vocab_size": draw(st.integers(8, 20)),
            "hidden_size": hidden,
            "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": heads,
            "kv_channels": hidden // heads,
            "intermediate_size": 2 * draw(st.integers(1, 9)),
            "visual": {
                "heads": vit_heads,
                "image_size": patch * draw(st.integers(1, 4)),
                "image_start_id": 4,
                "layers": draw(st.integers(1, 3)),
                "mlp_ratio": draw(st.sampled_from([1.0, 1.5, 2.68])),
                "n_queries": draw(st.sampled_from([1, 4, 9])),
                "output_dim": hidden,
                "patch_size": patch,
                "width": width,
            },
        }
    )


@settings(max_examples=15, deadline=None)
@given(configs(), st.integers(0, 2**32 - 1))
def test_every_parameter_is_one_tensor_and_back(config, seed):
    tensors = checkpoint_tensors(config)
    shapes = {path: leaf.shape for path, leaf in param_paths(abstract_model(config, stacked=True)).items()}
    # Bijective: each name once, and together the layers of each parameter exactly once.
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    covered: dict[str, list] = {}
    for tensor in tensors:
        covered.setdefault(tensor.path, []).append(tensor.layer)
    assert covered.keys() == shapes.keys()
    for path, layers in covered.items():
        assert layers in ([None], list(range(shapes[path][0])))
    random = np.random.default_rng(seed)
    for tensor in tensors:
        value = random.permutation(math.prod(tensor.shape)).reshape(tensor.shape)  # no two alike
        parameter = tensor.to_parameter(value)
        assert parameter.shape == (shapes[tensor.path] if tensor.layer is None else shapes[tensor.path][1:])
        np.testing.assert_array_equal(tensor.from_parameter(parameter), value)
        np.testing.assert_array_equal(np.sort(parameter, axis=None), np.arange(value.size))


@settings(max_examples=5, deadline=None)
@given(configs())
def test_a_list_of_layers_maps_to_the_same_parameters(config):
    tensors = checkpoint_tensors(config)
    stacked = param_paths(abstract_model(config, stacked=True))
    listed = param_paths(abstract_model(config, stacked=False))
    wanted = {(t.path, t.layer if t.path.startswith("layers.") else None) for t in tensors}
    assert {split_layer(path) for path in listed} == wanted
    for path, leaf in listed.items():
        base, layer = split_layer(path)
        assert leaf.shape == (stacked[base].shape if layer is None else stacked[base].shape[1:])


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("transformer.h.3.attn.masked_bias", True),
        ("transformer.h.31.attn.bias", True),
        ("transformer.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.c_attn.bias", False),
        ("transformer.h.0.attn.c_attn.lora_A.weight", False),
        ("lm_head.bias", False),
    ],
)
def test_only_known_buffers_are_harmless(name, harmless):
    assert is_harmless_extra(name) is harmless
