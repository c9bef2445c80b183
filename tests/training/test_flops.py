"""Model FLOPs against what the compiler counts in the same programs, and the rules for what is frozen."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.training.flops import language_stages, peak_flops, step_cost, vision_stages
from qwenvl_jax.training.step import named_parameters

VISION = VisionConfig(
    image_size=224, patch_size=14, width=256, layers=1, heads=4, mlp_ratio=4.0, output_dim=512, n_queries=256,
    image_start_id=4000,
)  # fmt: skip
CONFIG = QwenVLConfig(
    vocab_size=4096, hidden_size=512, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2048, visual=VISION
)
LENGTH = 64


def shapes() -> QwenVL:
    """The model's shapes alone, layers in a list: the compiler counts the body of a scan once."""
    return nnx.eval_shape(lambda: unstack(QwenVL(CONFIG, rngs=nnx.Rngs(0))))


def counted(function, *arguments) -> float:
    """FLOPs of a program as the compiler counts them, before it is compiled."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def words(model, ids):
    mask, positions = causal_mask(jnp.ones(ids.shape, bool)), jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    context = model.context(mask, positions, jnp.asarray(frequencies(CONFIG, [0])), training=True)
    return model.logits(model(model.embed(ids), context)[0])


def paths(model, *prefixes: str) -> dict:
    params, _ = named_parameters({"model": model})
    return {path: value for path, value in params.items() if path.startswith(tuple(f"model.{p}" for p in prefixes))}


def test_the_forward_pass_is_what_the_compiler_counts():
    model = shapes()
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    # Every query is compared with every key and then masked, so the compiler sees all pairs.
    tokens, pairs, head = language_stages(CONFIG, {})
    expected = LENGTH * (tokens.weights + head.weights) + LENGTH**2 * pairs.attention
    assert counted(words, model, ids) == pytest.approx(expected, rel=0.03)
    # The grid is that of the position table, which is else interpolated by a product that is none of the formula's.
    pixels = jax.ShapeDtypeStruct((1, 3, 224, 224), jnp.float32)
    expected = sum(stage.weights + stage.attention for stage in vision_stages(VISION, {}))
    assert counted(lambda model, pixels: model.encode_images(pixels), model, pixels) == pytest.approx(
        expected, rel=0.03
    )


@pytest.mark.parametrize(
    ("trained", "unused"),
    # Under the lowest product nothing learns, and the formula counts the gradient that would go there.
    [
        (("layers", "embedding", "lm_head", "norm_final"), 0),
        (("lm_head",), 2 * LENGTH * 512 * 4096),
        (("layers.0.qkv",), 2 * LENGTH * 3 * 512**2),
    ],
)
def test_the_backward_pass_is_what_the_compiler_counts(trained, unused):
    model = shapes()
    params, rebuild = named_parameters({"model": model})
    moving = paths(model, *trained)
    frozen = {path: value for path, value in params.items() if path not in moving}

    def loss(moving, frozen, ids):
        return jnp.square(words(rebuild(moving | frozen)["model"], ids)).sum()

    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    found = counted(jax.value_and_grad(loss), moving, frozen, ids)
    expected = step_cost(CONFIG, moving).flops(LENGTH, LENGTH**2, LENGTH, 0)
    assert found == pytest.approx(expected - unused, rel=0.03)


def test_what_is_frozen_costs_less():
    model = shapes()
    weights = 4 * 512**2 + 3 * 512 * 1024
    forward = 2 * 2 * weights
    everything = step_cost(CONFIG, paths(model, ""))
    assert everything.token == 3 * forward  # 6 N
    assert everything.picture == 3 * sum(stage.weights + stage.attention for stage in vision_stages(VISION, {}))
    language = step_cost(CONFIG, paths(model, "layers", "norm_final"))
    assert language.token == 3 * forward
    assert language.target == 2 * 2 * 512 * 4096  # its weights are frozen, the gradient goes through
    assert language.picture * 3 == everything.picture  # encoded, and no gradient comes back
    adapter = {
        "model.layers.0.qkv.a": jax.ShapeDtypeStruct((512, 8), jnp.float32),
        "model.layers.0.qkv.b": jax.ShapeDtypeStruct((8, 3, 512), jnp.float32),
    }
    assert step_cost(CONFIG, adapter).token == 2 * forward + 6 * (512 * 8 + 8 * 3 * 512)  # 4 N, and 6 of the adapter
    resampler = step_cost(CONFIG, paths(model, "visual.resampler"))
    assert resampler.token == 2 * forward
    assert language.picture < resampler.picture < everything.picture


def test_the_peak_of_a_device_is_known_or_none():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA L4") != peak_flops("NVIDIA L40S")
    assert peak_flops("NVIDIA A10G") is None  # no A10
    assert peak_flops("cpu") is None
