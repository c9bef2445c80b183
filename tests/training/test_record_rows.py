"""Rows of whole records compute what each record alone computes, in logits, loss and gradient, however they attend."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.record_batches import BatchRecipe, RecordBatches
from qwenvl_jax.data.records import Record
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies
from qwenvl_jax.nn import attention, row_attention
from qwenvl_jax.nn.attention import causal_mask, packed_blocks, packed_mask
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.loss import NEXT_TOKEN
from qwenvl_jax.training.recipe import NewModel
from qwenvl_jax.training.record_rows import record_hidden
from qwenvl_jax.training.step import batch_loss, make_evaluation_step, named_parameters

VOCABULARY = "qwenvl_jax/assets/tiny/qwen.tiktoken"


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer.from_file(VOCABULARY, 4)
    shape = NewModel(
        layers=1, hidden_size=128, heads=2, intermediate_size=64, image_size=16, patch_size=8, vision_width=16,
        vision_layers=1, vision_heads=2, n_queries=4,
        seq_length=16,  # records are longer: outside training, dynamic NTK and logn attention would show
    )  # fmt: skip
    return Processor(tokenizer, shape.config(tokenizer.image_start_id))


@pytest.fixture(scope="module")
def model(processor):
    return QwenVL(processor.config, rngs=nnx.Rngs(0))


def record(number: int, pictures: int) -> Record:
    rng = np.random.default_rng(number)
    shown = [Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)) for _ in range(pictures)]
    asked = [{"type": "image", "image": picture} for picture in shown]
    messages = [
        {"role": "user", "content": [*asked, {"type": "text", "text": "what is here? " * (1 + number % 2)}]},
        {"role": "assistant", "content": f"a red cross and {number} circles"},
    ]
    return Record(messages, f"memory:{number + 1}")


RECORDS = [record(number, pictures) for number, pictures in enumerate([0, 1, 2, 1])]


@pytest.fixture(scope="module")
def batches(processor):
    return RecordBatches(BatchRecipe(max_length=120), Mixture([RECORDS]), processor, rows=2, epochs=1)


def logits_alone(model, processor, index):
    """float32 [T, V] of a record by itself, in training mode."""
    prompt, labels = processor.training(RECORDS[index].messages)
    length = len(labels)
    features = model.encode_images(prompt.pixels) if len(prompt.pixels) else None
    context = model.context(
        causal_mask(jnp.ones((1, length), bool)),
        jnp.arange(length)[None],
        frequencies(model.config, [0]),
        training=True,
    )
    hidden, _ = model(model.embed(prompt.input_ids[None], features, prompt.image_slots[None]), context)
    return model.logits(hidden[0]), labels


def loss_alone(model, processor):
    """Mean cross-entropy over the trained tokens of all records, computed one by one, and their logits."""
    total, count = jnp.zeros(()), 0
    found = [logits_alone(model, processor, index) for index in range(len(RECORDS))]
    for logits, labels in found:
        trained = 1 + np.flatnonzero(labels[1:] != IGNORED)
        total -= jnp.sum(jax.nn.log_softmax(logits)[trained - 1, labels[trained]])
        count += len(trained)
    return total / count, [logits for logits, _ in found]


def hidden_with(mask_of, model, batch, *, remat="none"):
    """`record_hidden` with another form of the mask."""
    features = model.encode_images(batch["pixels"])
    rotary = jnp.asarray(frequencies(model.config, [0])).repeat(len(batch["ids"]), axis=0)
    context = model.context(mask_of(batch["group"]), batch["positions"], rotary, training=True)
    return model(model.embed(batch["ids"], features, batch["slots"]), context, remat=remat)[0], features


BACKENDS = {
    "rows": None,
    "rows in blocks": None,
    "mask": lambda group: packed_mask(group, jnp.zeros_like(group)),
    "mask in blocks": lambda group: packed_mask(group, jnp.zeros_like(group)),
    "blocks without a prefix": lambda group: packed_blocks(group, jnp.ones_like(group), 0, group.shape[1]),
}


@pytest.fixture(params=BACKENDS)
def hidden_of(request, batches, monkeypatch):
    """A forward pass that attends in one of the ways of `nn`."""
    if "in blocks" in request.param:
        monkeypatch.setattr(row_attention, "BLOCK_BOUNDS", (32, 32))
        monkeypatch.setattr(attention, "LONGEST_DENSE", 32)
    mask_of = BACKENDS[request.param]
    return partial(record_hidden, longest=batches.longest) if mask_of is None else partial(hidden_with, mask_of)


@pytest.fixture(scope="module")
def expected(model, processor):
    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_alone, has_aux=True), static_argnums=1)(model, processor)
    return logits, loss, grads


def assert_gradients_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))


def test_packed_records_equal_records_alone(model, batches, hidden_of, expected):
    assert len(batches) == 1
    assert max(len(row) for row in batches.plan[0][1]) >= 2
    batch, (alone, loss, grads) = batches[0], expected

    def packed(model):
        total = batch_loss({"model": model}, batch, hidden_of=hidden_of)[0]
        return total / NEXT_TOKEN.units(batch), model.logits(hidden_of(model, batch)[0])

    (found, logits), found_grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(model)
    np.testing.assert_allclose(found, loss, rtol=2e-6)
    assert_gradients_equal(found_grads, grads)
    for row, records in enumerate(batches.plan[0][1]):
        for group, index in enumerate(records, start=1):
            np.testing.assert_allclose(logits[row, batch["group"][row] == group], alone[index], atol=2e-5)


def test_records_do_not_touch_each_other(model, batches):
    """Another picture and another text in one record leave the numbers of its neighbours as they were, to the bit."""
    batch = batches[0]
    records = batches.plan[0][1][0]
    group = next(g for g, index in enumerate(records, start=1) if batches.pictures[index])
    hidden = jax.jit(partial(record_hidden, longest=batches.longest))
    before = np.asarray(hidden(model, batch)[0])
    changed = {name: value.copy() for name, value in batch.items()}
    own = batch["group"][0] == group
    changed["ids"][0, own] += 1
    changed["pixels"][np.unique(batch["slots"][0, own & (batch["slots"][0] >= 0)] // 4)] += 1
    after = np.asarray(hidden(model, changed)[0])
    others = (batch["group"] > 0) & ~(np.arange(2)[:, None] == 0) | (batch["group"] > 0) & ~own
    assert np.array_equal(before[others], after[others])
    assert not np.allclose(before[0, own], after[0, own])


def test_padding_pictures_and_recomputed_layers_change_nothing(model, batches, expected):
    batch = batches[0]
    more = batch | {"pixels": np.concatenate([batch["pixels"], np.ones_like(batch["pixels"])])}
    hidden_of = partial(record_hidden, longest=batches.longest)

    def loss(model):
        return batch_loss({"model": model}, more, remat="layers", hidden_of=hidden_of)[0] / NEXT_TOKEN.units(more)

    assert_gradients_equal(jax.jit(jax.grad(loss))(model), expected[2])


def test_text_alone_needs_no_pictures(model, processor):
    texts = [RECORDS[0], record(4, 0)]
    batches = RecordBatches(BatchRecipe(max_length=120), Mixture([texts]), processor, rows=1, epochs=1)
    batch = batches[0]
    assert "pixels" not in batch
    params, rebuild = named_parameters({"model": model})
    step = jax.jit(make_evaluation_step(rebuild, hidden_of=partial(record_hidden, longest=batches.longest)))
    total, count, right = step(params, {}, batch)
    labels = [processor.training(record.messages)[1][1:] for record in texts]
    assert count == sum(np.sum(label != IGNORED) for label in labels)
    assert float(total) > 0
    assert right.shape == batch["targets"].shape
