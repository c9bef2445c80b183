"""Single layers against transformers and torch: values and gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity.reference import (
    TorchVision,
    language_config,
    original_tensors,
    random_model,
    relative_error,
    resized,
    tensor,
    tiny_config,
    torch_names,
)
from torch import nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding, apply_rotary_pos_emb

from qwenvl_jax.models.qwen_vl import frequencies, unstack
from qwenvl_jax.models.vit import bicubic_weights, resize_positions
from qwenvl_jax.nn.attention import attend, causal_mask
from qwenvl_jax.nn.norm import LayerNorm, RMSNorm
from qwenvl_jax.nn.rope import rotary_table, rotate
from qwenvl_jax.training.loss import next_token_loss

VALUE = 5e-6  # relative to the largest value: float32 arithmetic in another order
GRADIENT = 2e-5


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compare(ours, theirs, values, *, wanted):
    """Values of two functions, and the gradients of a random projection of their outputs.

    ours: of a jax array per input; theirs: of a torch tensor per input; wanted: how many inputs have gradients.
    """
    mine, backward = jax.vjp(ours, *values)
    inputs = [tensor(value).requires_grad_(number < wanted) for number, value in enumerate(values)]
    reference = theirs(*inputs)
    direction = random(*mine.shape, seed=99)
    reference.backward(tensor(direction))
    assert relative_error(mine, reference.detach()) < VALUE
    for number, gradient in enumerate(backward(jnp.asarray(direction))[:wanted]):
        assert relative_error(gradient, inputs[number].grad) < GRADIENT, f"input {number}"


def with_values(module, **values):
    """The nnx module with these arrays in place of its parameters."""
    for name, value in values.items():
        getattr(module, name)[...] = value
    return module


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_rms_norm(epsilon):
    def ours(x, scale):
        return with_values(RMSNorm(64, epsilon=epsilon, dtype=jnp.float32), scale=scale)(x)

    def theirs(x, scale):
        return torch.func.functional_call(Qwen2RMSNorm(64, eps=epsilon), {"weight": scale}, (x,))

    compare(ours, theirs, [random(2, 3, 64), random(64, seed=1)], wanted=2)
    compare(ours, theirs, [1e-3 * random(2, 3, 64), random(64, seed=1)], wanted=2)


def test_rms_norm_in_bfloat16():
    """The same rounding points, so nearly all values are the same bits."""
    x, scale = random(64, 256), random(256, seed=1)
    norm = with_values(RMSNorm(256, epsilon=1e-6, dtype=jnp.bfloat16), scale=jnp.asarray(scale, jnp.bfloat16))
    reference = Qwen2RMSNorm(256).bfloat16()
    reference.weight.data = tensor(scale).bfloat16()
    mine = np.asarray(norm(jnp.asarray(x, jnp.bfloat16)), np.float32)
    same = mine == reference(tensor(x).bfloat16()).detach().float().numpy()
    assert same.mean() > 0.999


def test_layer_norm():
    def ours(x, scale, bias):
        return with_values(LayerNorm(64, epsilon=1e-6, dtype=jnp.float32), scale=scale, bias=bias)(x)

    def theirs(x, scale, bias):
        return functional.layer_norm(x, (64,), scale, bias, eps=1e-6)

    compare(ours, theirs, [3 + random(2, 3, 64), random(64, seed=1), random(64, seed=2)], wanted=3)


@pytest.mark.parametrize(("longest", "tolerance"), [(16, VALUE), (4096, 1e-3)])
def test_rotary_positions(longest, tolerance):
    """Angles of thousands of radians have few digits left after the point in float32, on both sides."""
    config = tiny_config()
    positions = np.random.default_rng(0).integers(0, longest, (2, 9))
    embedding = Qwen2RotaryEmbedding(language_config(config))

    def ours(x):
        return rotate(x, *rotary_table(jnp.asarray(positions), jnp.asarray(frequencies(config, [0, 0]))))

    def theirs(x):
        cos, sin = embedding(x, tensor(positions))
        return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    x = random(2, 9, 4, 32)
    assert relative_error(ours(x), theirs(tensor(x))) < tolerance
    if longest == 16:
        compare(ours, theirs, [x], wanted=1)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    mask = np.asarray(causal_mask(jnp.ones((2, 6), bool))) if masked else None

    def theirs(q, k, v):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        bias = None if mask is None else tensor(mask)[:, None]
        return functional.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)

    compare(lambda q, k, v: attend(q, k, v, mask), theirs, [random(2, 6, 3, 8, seed=i) for i in range(3)], wanted=3)


@pytest.mark.parametrize("part", ["attention", "mlp", "both"])
def test_decoder_layer(part):
    """A layer with the output projection of its other half set to zero, so that each half is seen alone."""
    model = random_model(tiny_config(num_hidden_layers=1))
    if part != "both":
        silent = model.layers.down if part == "attention" else model.layers.out
        silent.kernel[...] = jnp.zeros_like(silent.kernel[...])
    reference = Qwen2ForCausalLM(language_config(model.config))
    names = torch_names(model.config, original_tensors(model))
    language = {k.removeprefix("language."): tensor(v) for k, v in names.items() if k.startswith("language.")}
    reference.load_state_dict(language, strict=True)
    length = 9
    positions = np.broadcast_to(np.arange(length), (2, length))
    mask = causal_mask(jnp.ones((2, length), bool))
    context = model.context(mask, jnp.asarray(positions), jnp.asarray(frequencies(model.config, [0, 0])))
    layer = unstack(model).layers[0]

    def theirs(x):
        bias = torch.where(tensor(mask)[:, None], 0.0, torch.finfo(torch.float32).min)
        tables = reference.model.rotary_emb(x, tensor(positions))
        return reference.model.layers[0](x, attention_mask=bias, position_embeddings=tables) - x

    compare(lambda x: layer(x, context)[0] - x, theirs, [random(2, length, 128)], wanted=1)


@pytest.mark.parametrize("heads", [3, 8, 1])
def test_vit_block(heads):
    """Weights interleaved per head on one side, in three parts on the other; the GELU is the exact one."""
    model = random_model(tiny_config(visual_heads=heads, visual_layers=1), seed=heads)
    reference = TorchVision(model.config.visual)
    names = torch_names(model.config, original_tensors(model))
    vision = {k.removeprefix("vision."): tensor(v) for k, v in names.items() if k.startswith("vision.")}
    reference.load_state_dict(vision, strict=True)
    block = jax.tree.map(lambda a: a[0], model.visual.vit.blocks)
    compare(block, lambda x: reference.blocks[0](x, None), [random(2, 16, 48)], wanted=1)


def test_patches_are_a_convolution():
    model = random_model(tiny_config())
    vit = model.visual.vit
    kernel = original_tensors(model)["transformer.visual.conv1.weight"]

    def ours(pixels):
        return vit.embed(pixels)

    def theirs(pixels):
        patches = functional.conv2d(pixels, tensor(kernel), stride=8).flatten(2).transpose(1, 2)
        patches = patches + resized(tensor(vit.positions[...]), 4)
        return functional.layer_norm(
            patches, (48,), tensor(vit.norm_pre.scale[...]), tensor(vit.norm_pre.bias[...]), 1e-6
        )

    compare(ours, theirs, [random(2, 3, 32, 32)], wanted=1)


@pytest.mark.parametrize(("source", "target"), [(16, 32), (16, 4), (16, 17), (3, 16), (1, 5), (2, 2), (5, 1)])
def test_bicubic_tables(source, target):
    table = random(source**2, 6)
    compare(lambda x: resize_positions(x, target), lambda x: resized(x, target), [table], wanted=1)
    line = functional.interpolate(torch.eye(source)[None, None], size=(source, target), mode="bicubic")[0, 0]
    np.testing.assert_allclose(bicubic_weights(source, target), line.T, atol=1e-6)


@pytest.mark.parametrize("width", [48, 128])
def test_resampler(width):
    """Cross-attention with torch's own multi-head attention; a width of 128 leaves the projection out."""
    model = random_model(tiny_config(visual_width=width, visual_heads=4), seed=width)
    resampler = model.visual.resampler
    reference = TorchVision(model.config.visual)
    names = torch_names(model.config, original_tensors(model))
    reference.load_state_dict({k.removeprefix("vision."): tensor(v) for k, v in names.items() if "vision." in k})

    def theirs(patches):
        kv = reference.ln_kv(reference.kv_proj(patches))
        query = (reference.ln_q(reference.query) + reference.pos_embed).expand(len(patches), -1, -1)
        return reference.attn(query, kv + resized(reference.pos_embed, 4), kv)[0]

    compare(resampler, theirs, [random(2, 16, width)], wanted=1)


def test_losses():
    """Sum over supervised tokens, chunked or not, for logits of ordinary size and for huge ones."""
    identity = SimpleNamespace(logits=lambda hidden: hidden)
    generator = np.random.default_rng(5)
    targets = generator.integers(0, 30, (3, 11)).astype(np.int32)
    targets[generator.random(targets.shape) < 0.4] = -100
    positions = np.broadcast_to(np.arange(11), (3, 11))

    def theirs(logits):
        return functional.cross_entropy(logits.flatten(0, 1), tensor(targets).flatten().long(), reduction="sum")

    for scale in (3.0, 1e4):
        for chunk in (4096, 7, 1):
            compare(
                lambda logits, chunk=chunk: next_token_loss(identity, logits, positions, targets, chunk=chunk)[0],
                theirs,
                [scale * random(3, 11, 30)],
                wanted=1,
            )
    assert float(next_token_loss(identity, random(3, 11, 30), positions, targets)[1]) == (targets >= 0).sum()


def test_the_comparison_can_fail():
    """The tanh GELU, a frequent mistake, is told from the exact one."""
    with pytest.raises(AssertionError):
        compare(lambda x: jax.nn.gelu(x, approximate=True), nn.GELU(), [random(4, 64)], wanted=1)
