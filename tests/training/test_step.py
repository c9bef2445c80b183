"""Packed rows compute what separate sequences compute, in value and gradient; the auxiliary head sees its cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.data.packing import IGNORED, RowShape, collate, pack_branches
from qwenvl_jax.data.questions import KINDS
from qwenvl_jax.data.scene_rows import SceneRecipe, SceneRows
from qwenvl_jax.data.scenes import sample_scene
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.processing.template import Segment
from qwenvl_jax.training.auxiliary import CellHead, CellTargets, cell_loss, start_local
from qwenvl_jax.training.evaluation import device_batch, evaluate
from qwenvl_jax.training.loss import NEXT_TOKEN
from qwenvl_jax.training.recipe import NewModel
from qwenvl_jax.training.step import batch_loss, make_evaluation_step, named_parameters

TINY = "qwenvl_jax/assets/tiny/qwen.tiktoken"


@pytest.fixture(scope="module")
def config():
    shape = NewModel(
        layers=1, intermediate_size=64, image_size=32, patch_size=8, vision_width=32, vision_layers=1, vision_heads=2,
        n_queries=16,
    )  # fmt: skip
    return shape.config(image_start_id=1021)


@pytest.fixture(scope="module")
def model(config):
    return QwenVL(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows(config):
    recipe = SceneRecipe(
        row=RowShape(prefix=48, blocks=2, block=64, targets=96),
        pair_row=RowShape(prefix=80, blocks=1, block=64, targets=64),
        two_pictures_every=2,
        questions=3,
        conversation_share=0.5,
    )
    return SceneRows(recipe, TINY, config, steps=4, batch_size=2)


def sequences_of(row: dict) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The separate sequences (ids, slots, labels) that a packed row holds."""
    prefix = len(row["ids"]) - row["branch"].size
    shared = np.flatnonzero(row["group"][:prefix] > 0)
    labels = np.full(len(row["ids"]), IGNORED)
    place = {p: t for p, t in zip(row["target_positions"], row["targets"], strict=True) if t != IGNORED}
    for position, target in place.items():
        labels[position] = target  # of the token that predicts it
    result = []
    for number in np.unique(row["branch"])[1:]:
        own = prefix + np.flatnonzero(row["branch"].reshape(-1) == number)
        where = np.concatenate([shared, own])
        assert np.array_equal(row["positions"][where], np.arange(len(where)))
        result.append((row["ids"][where], row["slots"][where], labels[where]))
    return result


def separate_loss(model, batch_rows: list[dict]) -> jax.Array:
    """Mean cross-entropy of all sequences of the rows, computed one by one."""
    total, count = jnp.zeros(()), 0
    for row in batch_rows:
        features = model.encode_images(row["pixels"])
        for ids, slots, labels in sequences_of(row):
            length = len(ids)
            context = model.context(
                causal_mask(jnp.ones((1, length), bool)),
                jnp.arange(length)[None],
                frequencies(model.config, [0]),
                training=True,
            )
            hidden, _ = model(model.embed(ids[None], features, slots[None]), context)
            log_p = jax.nn.log_softmax(model.logits(hidden[0]))
            trained = np.flatnonzero(labels != IGNORED)
            total -= jnp.sum(log_p[trained, labels[trained]])
            count += len(trained)
    return total / count


@pytest.mark.parametrize("step", [0, 1], ids=["one picture", "two pictures"])
def test_packed_rows_equal_separate_sequences(model, rows, step):
    chosen = [rows[2 * step]]
    batch = device_batch(collate(chosen, rows.config.visual.n_queries))

    def packed(model):
        return batch_loss({"model": model}, batch)[0] / NEXT_TOKEN.units(batch)

    value, grads = jax.jit(jax.value_and_grad(packed))(model)
    separate = jax.jit(jax.value_and_grad(lambda model: separate_loss(model, chosen)))  # one program, not hundreds
    expected, expected_grads = separate(model)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6 * max(1.0, float(jnp.abs(wanted).max())))


def test_recomputing_layers_changes_nothing(model, rows):
    batch = device_batch(collate([rows[0]], rows.config.visual.n_queries))

    def loss(model, remat):
        return batch_loss({"model": model}, batch, remat=remat)[0]

    def gradients(model, remat):
        return jax.jit(jax.grad(loss), static_argnums=1)(model, remat)

    expected = gradients(model, "none")
    for form, remat in ((model, "layers"), (model, "products"), (unstack(model), "layers")):
        wanted = unstack(expected) if form is not model else expected
        for a, b in zip(jax.tree.leaves(gradients(form, remat)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_repeat_and_differ(rows):
    first, again, other = rows[0], rows[0], rows[1]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["pixels"], other["pixels"])


def test_the_curriculum_bounds_the_objects(config):
    recipe = SceneRecipe(curriculum=((0.0, 1), (0.5, 3)))
    rows = SceneRows(recipe, TINY, config, steps=10, batch_size=2)
    assert [rows.max_objects(step) for step in (0, 4, 5, 9)] == [1, 1, 3, 3]


def test_a_branch_that_fits_nowhere_is_left_out_and_none_at_all_is_an_error():
    shape = RowShape(prefix=4, blocks=1, block=4, targets=4)
    short = (Segment([7, 8], [-1, -1]), [IGNORED, 8])
    long = (Segment([1] * 5, [-1] * 5), [1] * 5)
    row = pack_branches(Segment([5, 6], [-1, -1]), [long, short], shape)
    assert row["ids"].tolist() == [5, 6, 0, 0, 7, 8, 0, 0]
    assert row["targets"].tolist() == [8, IGNORED, IGNORED, IGNORED]
    assert row["target_positions"][0] == 4
    with pytest.raises(ValueError, match="no branch fits"):
        pack_branches(Segment([5], [-1]), [long], shape)
    with pytest.raises(ValueError, match="prefix of 5 tokens"):
        pack_branches(Segment([5] * 5, [-1] * 5), [short], shape)


def test_queries_begin_at_their_own_part_of_the_picture(config):
    resampler = start_local(QwenVL(config, rngs=nnx.Rngs(1))).visual.resampler
    patches = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, config.visual.width)), jnp.float32)
    # Each patch's own output moves most when that patch changes.
    jacobian = jax.jit(jax.jacobian(lambda x: resampler(x)[0]))(patches)[:, :, 0]  # [Q, D, P, W]
    influence = np.asarray(jnp.sqrt(jnp.sum(jnp.square(jacobian), axis=(1, 3))))
    assert np.array_equal(influence.argmax(axis=1), np.arange(16))


def test_the_cell_head_can_learn_what_covers_each_cell(config):
    """Its outputs and the labels number the cells alike: a head that is told each cell's label learns all of them."""
    targets = CellTargets(color=9, shape=7, size=3, glyph=37)
    head = CellHead(config.visual, targets, cells=2, rngs=nnx.Rngs(0))
    labels = sample_scene(0, "train", 3).cell_labels(8)
    assert {name: value.shape[0] for name, value in labels.items()} == dict.fromkeys(labels, 64)
    # Output g of cell (row, column) comes from query (row // 2, column // 2), part (row % 2, column % 2).
    features = jax.nn.one_hot(jnp.arange(16), 128)[None]
    kernel = np.zeros(head.linear.kernel[...].shape, np.float32)
    for cell, color in enumerate(labels["color"]):
        row, column = divmod(cell, 8)
        kernel[row // 2 * 4 + column // 2, row % 2 * 2 + column % 2, color] = 50
    head.linear.kernel[...] = jnp.asarray(kernel)
    predicted = head(features)
    assert np.array_equal(predicted["color"][0].argmax(-1), labels["color"])
    batch = {name: jnp.asarray(value)[None] for name, value in labels.items()}
    assert float(cell_loss({"color": predicted["color"]}, batch)) < 1e-6


def test_evaluation_counts_whole_answers(model, rows, config):
    batch = collate([rows[0], rows[1]], config.visual.n_queries)
    params, rebuild = named_parameters({"model": model})
    step = jax.jit(make_evaluation_step(rebuild))

    def all_right_but_one(batch):
        total, count, hits = step(params, {}, batch)
        hits = np.ones(hits.shape, bool)
        hits[0, np.flatnonzero(chosen["target_branch"][0] == first)[0]] = False
        return total, count, hits

    chosen = batch
    first = next(branch for branch in chosen["target_branch"][0] if branch > 0)  # one too long is not in the row
    result = evaluate(all_right_but_one, [(batch, device_batch(batch))])
    names = ["", *KINDS, "conversation"]
    kinds = [
        names[k] for row in range(2) for k in chosen["branch_kind"][row][np.unique(chosen["target_branch"][row])[1:]]
    ]
    missed = names[chosen["branch_kind"][0][first]]
    assert result[f"right/{missed}"] == pytest.approx(1 - 1 / kinds.count(missed))
    assert all(result[f"right/{kind}"] == 1 for kind in set(kinds) - {missed})
