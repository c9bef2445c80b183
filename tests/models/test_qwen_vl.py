"""The model apart from its goldens: properties that hold for any weights, and the real model's size."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.checkpoints.huggingface import abstract_model
from qwenvl_jax.config import QwenVLConfig, UserError, VisionConfig
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack, with_image_size
from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.attention import causal_mask, packed_blocks, packed_mask
from qwenvl_jax.sharding import param_paths

CONFIG = QwenVLConfig(
    vocab_size=100,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    kv_channels=32,
    intermediate_size=64,
    seq_length=16,
    initializer_range=0.1,
    visual=VisionConfig(
        image_size=16, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2.0, output_dim=128, n_queries=4,
        image_start_id=90,
    ),
)  # fmt: skip


@functools.cache
def stacked() -> QwenVL:
    # Compiled as a whole: one by one, the random values of all parameters take longer than most tests here.
    return jax.jit(lambda: QwenVL(CONFIG, rngs=nnx.Rngs(0)))()


@functools.cache
def unrolled() -> QwenVL:
    return unstack(stacked())


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 90, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("training", "remat"))
def run(model, ids, mask, positions, rotary, features=None, slots=None, training=False, remat="none"):
    context = model.context(mask, positions, rotary, training=training)
    return model.logits(model(model.embed(ids, features, slots), context, remat=remat)[0])


def logits(model, ids, *, valid=None, first=0, config=CONFIG, **options):
    """Logits [B, T, V] of plain causal sequences whose first token has position `first`."""
    rows, length = ids.shape
    valid = jnp.ones(ids.shape, bool) if valid is None else jnp.asarray(valid)
    positions = jnp.broadcast_to(first + jnp.arange(length), ids.shape)
    rotary = frequencies(config, [length] * rows)
    return np.asarray(run(model, ids, causal_mask(valid), positions, rotary, **options))


def close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


def test_a_token_does_not_see_the_future():
    ids = random_ids(1, 12)
    changed = ids.copy()
    changed[0, 7:] = (changed[0, 7:] + 1) % 90
    before, after = logits(unrolled(), ids), logits(unrolled(), changed)
    close(before[:, :7], after[:, :7], 0)
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 0.01


def test_rows_of_a_batch_are_independent():
    ids = random_ids(3, 12)
    together = logits(unrolled(), ids)
    for row in range(3):
        close(together[row], logits(unrolled(), ids[row : row + 1])[0])


def test_padding_is_invisible():
    """On either side; rotary positions are relative, so those of the real tokens may begin anywhere."""
    ids = random_ids(1, 12)
    alone = logits(unrolled(), ids[:, 4:])
    valid = np.arange(12)[None] >= 4
    close(logits(unrolled(), ids, valid=valid)[:, 4:], alone)
    garbage = np.where(valid, ids, 7)
    close(logits(unrolled(), garbage, valid=valid)[:, 4:], alone)
    close(logits(unrolled(), ids, valid=~(np.arange(12)[None] >= 8))[:, :8], logits(unrolled(), ids[:, :8]))


def test_evaluation_beyond_the_training_length_and_training_differ():
    """Dynamic NTK and logn count from token 17 on, in evaluation only."""
    short, long = random_ids(1, 16), random_ids(1, 20)
    close(logits(stacked(), short), logits(stacked(), short, training=True), 0)
    trained = run(
        stacked(), long, causal_mask(jnp.ones((1, 20), bool)), jnp.arange(20)[None], frequencies(CONFIG, [0]),
        training=True,
    )  # fmt: skip
    difference = np.abs(logits(stacked(), long) - np.asarray(trained))
    assert difference[:, :16].max() > 0.01, "NTK turns all positions"
    without_ntk = dataclasses.replace(CONFIG, use_dynamic_ntk=False)
    difference = np.abs(logits(stacked(), long, config=without_ntk) - np.asarray(trained))
    assert difference[:, :16].max() < 1e-5
    assert difference[:, 16:].max() > 1e-4, "logn scales queries beyond the training length"


def test_nothing_is_remembered_between_calls():
    """The original keeps the NTK factor of its last evaluation, and its training forward then uses it."""
    ids = random_ids(2, 12)
    before = logits(stacked(), ids, training=True)
    logits(stacked(), random_ids(1, 40))
    close(logits(stacked(), ids, training=True), before, 0)


def test_recomputation_changes_no_gradient():
    ids = random_ids(2, 12)

    def loss(model, remat):
        return jnp.sum(
            jnp.sin(
                run(
                    model, ids, causal_mask(jnp.ones(ids.shape, bool)), jnp.arange(12)[None].repeat(2, 0),
                    frequencies(CONFIG, [0, 0]), remat=remat,
                )
            )
        )  # fmt: skip

    plain, again = (jax.jit(jax.grad(functools.partial(loss, remat=remat)))(stacked()) for remat in ("none", "layers"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, plain)


def test_decoding_over_a_cache_is_the_forward_pass():
    """A prompt in one pass, then one token at a time: hidden states as of the whole sequence in one pass.

    The prompt is shorter than the training length and the reply grows beyond it, where logn begins.
    """
    ids, prompt, room = random_ids(2, 22), 10, 16
    model, rotary = unrolled(), frequencies(CONFIG, [10, 10])
    everywhere = jnp.arange(22)[None].repeat(2, 0)
    whole = np.asarray(run(model, ids, causal_mask(jnp.ones(ids.shape, bool)), everywhere, rotary))

    @jax.jit
    def prefill(ids):
        context = model.context(causal_mask(jnp.ones(ids.shape, bool)), everywhere[:, :prompt], rotary)
        hidden, kv = model(model.embed(ids), context)
        return model.logits(hidden), [kv_cache.start(k, v, room) for k, v in kv]

    @jax.jit
    def step(caches, token, at):
        past = jnp.full(2, prompt)
        taken = jnp.broadcast_to(jnp.arange(room) < at, (2, room))
        mask = kv_cache.cached_mask(past, prompt, taken, at, tokens=1)
        context = model.context(mask, (past + at)[:, None], rotary, cache_slot=at)
        hidden, caches = model(model.embed(token), context, caches)
        return model.logits(hidden), caches

    first, caches = prefill(ids[:, :prompt])
    close(first, whole[:, :prompt])
    for at in range(12):
        out, caches = step(caches, ids[:, prompt + at, None], jnp.int32(at))
        close(out[:, 0], whole[:, prompt + at])


def test_pictures_stand_in_their_slots_and_nowhere_else():
    model = stacked()
    ids = random_ids(2, 8)
    slots = np.full((2, 8), -1)
    slots[0, 2:4] = [5, 0]
    slots[1, 7] = 2
    features = np.random.default_rng(1).standard_normal((2, 4, 128)).astype(np.float32)
    embedded = np.asarray(model.embed(ids, features, slots))
    expected = np.asarray(model.embedding.table[...])[ids]
    expected[0, 2], expected[0, 3], expected[1, 7] = features[1, 1], features[0, 0], features[0, 2]
    np.testing.assert_array_equal(embedded, expected)


def test_overwritten_embeddings_get_no_gradient():
    ids = np.array([[1, 2, 3]])
    slots = np.array([[-1, 0, -1]])
    features = jnp.zeros((1, 4, 128))
    gradient = jax.grad(lambda m: jnp.sum(m.embed(ids, features, slots)))(stacked()).embedding.table[...]
    np.testing.assert_array_equal(np.flatnonzero(np.abs(gradient).sum(axis=1)), [1, 3])


def test_packed_rows_give_what_their_parts_give():
    """A shared prefix with three continuations in one row is three sequences."""
    prefix, width, blocks = 6, 5, 3
    ids = random_ids(1, prefix + width * blocks)
    group = np.ones(ids.shape, np.int32)
    branch = np.repeat([0, 1, 2, 3], [prefix, width, width, width])[None]
    positions = np.concatenate([np.arange(prefix), *[prefix + np.arange(width)] * blocks])[None]
    arguments = (jnp.asarray(positions), frequencies(CONFIG, [0]))
    as_blocks = packed_blocks(jnp.asarray(group), jnp.asarray(branch), prefix, width)
    as_mask = packed_mask(jnp.asarray(group), jnp.asarray(branch))
    for mask in (as_blocks, as_mask):
        packed = np.asarray(run(stacked(), ids, mask, *arguments, training=True))
        for number in range(blocks):
            tail = slice(prefix + number * width, prefix + (number + 1) * width)
            alone = logits(stacked(), np.concatenate([ids[:, :prefix], ids[:, tail]], axis=1), training=True)
            close(packed[:, :prefix], alone[:, :prefix])
            close(packed[:, tail], alone[:, prefix:])


def test_stacked_and_unrolled_models_share_values():
    listed, stack = param_paths(unrolled()), param_paths(stacked())
    for layer in range(CONFIG.num_hidden_layers):
        np.testing.assert_array_equal(listed[f"layers.{layer}.up.kernel"], stack["layers.up.kernel"][layer])
    assert unstack(unrolled()) is unrolled()
    assert sum(leaf.size for leaf in listed.values()) == sum(leaf.size for leaf in stack.values())
    close(logits(unrolled(), random_ids(2, 12)), logits(stacked(), random_ids(2, 12)))


def test_bfloat16_keeps_its_dtype_and_returns_float32_logits():
    made = nnx.eval_shape(lambda: QwenVL(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), stacked())
    ids = random_ids(1, 12)
    ours = logits(model, ids)
    assert ours.dtype == np.float32
    assert 0 < np.abs(ours - logits(stacked(), ids)).max() < 0.25
    features = jax.eval_shape(model.encode_images, np.zeros((1, 3, 16, 16), np.float32))
    assert features.dtype == jnp.bfloat16


def test_layers_start_from_different_values():
    """Stacked layers are made by a vmap over keys; one key for all would make them the same."""
    for kernel in (stacked().layers.qkv.kernel[...], stacked().layers.down.kernel[...]):
        assert np.abs(np.asarray(kernel[0]) - np.asarray(kernel[1])).mean() > 0.01


@pytest.mark.parametrize("path", ["layers.out.kernel", "layers.down.kernel", "visual.vit.blocks.down.kernel"])
def test_maps_into_the_residual_stream_start_smaller(path):
    std = float(np.std(param_paths(stacked())[path]))
    assert std == pytest.approx(CONFIG.initializer_range / (2 * CONFIG.num_hidden_layers) ** 0.5, rel=0.05)


def test_the_real_model_has_the_real_size(golden):
    """Built by shape alone: 9.66 billion parameters."""
    shapes = json.loads((golden / "param_shapes_full.json").read_text())
    config = QwenVLConfig(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=22016,
        visual=VisionConfig(
            image_size=448, patch_size=14, width=1664, layers=48, heads=16, mlp_ratio=4.9231, output_dim=4096
        ),
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config, stacked=True)))
    assert parameters == 9_656_935_168
    assert parameters == sum(int(np.prod(shape)) for shape in shapes.values())


def test_another_image_size_is_another_grid_of_the_same_weights():
    larger = dataclasses.replace(CONFIG, visual=dataclasses.replace(CONFIG.visual, image_size=32))
    born = jax.jit(lambda: QwenVL(larger, rngs=nnx.Rngs(0)))()
    grown = with_image_size(jax.tree.map(jnp.copy, stacked()), 32)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    assert grown.config == larger
    close(grown.encode_images(pixels), born.encode_images(pixels), 0)
    with pytest.raises(UserError, match="image_size 30 is not a multiple of patch_size 8"):
        with_image_size(grown, 30)
