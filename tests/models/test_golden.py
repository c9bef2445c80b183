"""The model against the original implementation: every `*.npz` of the golden folder, from pixels to gradients.

A file that is added to the folder is tested without code. Not here: greedy tokens (tests/inference), whole checkpoint
folders (tests/checkpoints).
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_folder
from PIL import Image

from qwenvl_jax.checkpoints.huggingface import abstract_model, checkpoint_tensors
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack
from qwenvl_jax.models.vit import resize_positions
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.processing.images import load_image, preprocess
from qwenvl_jax.sharding import param_paths
from qwenvl_jax.training.loss import next_token_loss

FLOAT32 = 5e-5  # absolute, on logits of magnitude 9; the arithmetic itself is good for 2e-5
BFLOAT16 = 0.25  # absolute; the original itself moves by 0.17 between float32 and bfloat16
GRADIENT = 1e-4  # relative

FILES = sorted(golden_folder().glob("*.npz"))


class Golden:
    """One file: its arrays, and the model with its weights."""

    def __init__(self, path: Path):
        self.values = np.load(path, allow_pickle=False)
        self.config = QwenVLConfig.from_hf(json.loads(str(self.values["config_json"])))
        self.meta = json.loads(str(self.values["meta_json"]))
        self.tensors = checkpoint_tensors(self.config)
        self.model = self._model()

    def __getitem__(self, key: str) -> np.ndarray:
        return self.values[key]

    def _model(self) -> QwenVL:
        """The model with stacked layers in float32. The file's weights must be exactly those that the table names."""
        assert {f"w/{t.name}" for t in self.tensors} == {k for k in self.values.files if k.startswith("w/")}
        shapes = abstract_model(self.config, stacked=True)
        arrays = {path: np.empty(leaf.shape, np.float32) for path, leaf in param_paths(shapes).items()}
        for tensor in self.tensors:
            weight = self[f"w/{tensor.name}"]
            assert weight.shape == tensor.shape, tensor.name
            target = arrays[tensor.path] if tensor.layer is None else arrays[tensor.path][tensor.layer]
            target[...] = tensor.to_parameter(weight)
        return jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(a) for a in arrays.values()])

    def batch(self, case: str, *, training: bool = False) -> dict[str, jax.Array | np.ndarray]:
        """Inputs of a case: ids, valid, slots [B, T], frequencies [B, rotary_dim / 2]; pixels if it has pictures."""
        ids = self[f"{case}/input_ids"]
        valid = np.ones(ids.shape, bool)
        if f"{case}/attention_mask" in self.values:
            valid = self[f"{case}/attention_mask"].astype(bool)
        slots = self._slots(ids)
        rows, length = ids.shape
        batch = {
            "ids": ids.astype(np.int32),
            "valid": valid,
            "slots": slots,
            # The original computes one factor from the padded length for the whole batch.
            "frequencies": frequencies(self.config, [0 if training else length] * rows),
        }
        return batch | ({"pixels": self["vis/pixels"]} if (slots >= 0).any() else {})

    def _slots(self, ids: np.ndarray) -> np.ndarray:
        """Which row of the flattened features each token is. Ids in a span are the bytes of its picture's name."""
        visual = self.config.visual
        rows_of = {path: int(k) for k, path in self.meta["image_paths"].items()}
        slots = np.full(ids.shape, -1, np.int32)
        for row, start in zip(*np.nonzero(ids == visual.image_start_id), strict=True):
            span = ids[row, start + 1 : start + 1 + visual.n_queries]
            path = bytes(span[span < visual.image_start_id].astype(np.uint8).tolist()).decode()
            first = rows_of[path] * visual.n_queries
            slots[row, start + 1 : start + 1 + visual.n_queries] = np.arange(first, first + visual.n_queries)
        return slots

    def tensor_gradients(self, gradients: QwenVL) -> dict[str, np.ndarray]:
        """Gradients by the original's tensor names, in its shapes."""
        arrays = {path: np.asarray(leaf) for path, leaf in param_paths(gradients).items()}
        return {
            t.name: t.from_parameter(arrays[t.path] if t.layer is None else arrays[t.path][t.layer])
            for t in self.tensors
        }


golden_of = functools.cache(Golden)


def having(key: str):
    """Parametrises a test over the files that hold this key."""
    files = [path for path in FILES if key in np.load(path).files]
    return pytest.mark.parametrize("path", files, ids=lambda path: path.stem)


def cases():
    """(file, case) of every evaluation case."""
    named = [
        (path, key.removesuffix("/input_ids")) for path in FILES for key in np.load(path).files if "/input_ids" in key
    ]
    found = [(path, case) for path, case in named if case != "train"]
    return pytest.mark.parametrize(("path", "case"), found, ids=[f"{path.stem}-{case}" for path, case in found])


def hidden_states(model: QwenVL, batch: dict, *, training: bool = False) -> list[jax.Array]:
    """Embeddings with pictures, the output of each layer but the last, and the normed last one, [B, T, D] each."""
    features = model.encode_images(batch["pixels"]) if "pixels" in batch else None
    positions = jnp.broadcast_to(jnp.arange(batch["ids"].shape[1]), batch["ids"].shape)
    context = model.context(causal_mask(batch["valid"]), positions, batch["frequencies"], training=training)
    states = [model.embed(batch["ids"], features, batch["slots"])]
    for layer in unstack(model).layers:
        states.append(layer(states[-1], context)[0])
    return [*states[:-1], model.norm_final(states[-1])]


def last_hidden(model: QwenVL, batch: dict, *, training: bool = False) -> jax.Array:
    """The model's own path through its layers: [B, T, D]."""
    features = model.encode_images(batch["pixels"]) if "pixels" in batch else None
    positions = jnp.broadcast_to(jnp.arange(batch["ids"].shape[1]), batch["ids"].shape)
    context = model.context(causal_mask(batch["valid"]), positions, batch["frequencies"], training=training)
    return model(model.embed(batch["ids"], features, batch["slots"]), context)[0]


@jax.jit
def evaluate(model: QwenVL, batch: dict) -> dict:
    """Everything that a case is compared on, in one compiled program."""
    plain = unstack(model)
    return {
        "hidden": hidden_states(model, batch),
        "scanned": model.logits(last_hidden(model, batch)),
        "unrolled": plain.logits(last_hidden(plain, batch)),
    }


@jax.jit
def see(model: QwenVL, pixels: jax.Array) -> dict[str, jax.Array]:
    visual = model.visual
    grid = model.config.visual.grid
    patches = visual.vit(pixels)
    return {
        "vis/pos_vit": resize_positions(visual.vit.positions[...], grid),
        "vis/pos_kv": resize_positions(visual.resampler.positions[...], grid),
        "vis/embed": visual.vit.embed(pixels),
        "vis/vit": patches,
        "vis/resampler": visual.resampler(patches),
        "vis/features": model.encode_images(pixels),
    }


def error(ours: jax.Array, theirs: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Largest absolute difference, where `valid` if given."""
    difference = np.abs(np.asarray(ours, np.float32) - theirs)
    return float((difference if valid is None else difference[valid]).max())


def test_there_are_golden_values():
    assert FILES, f"no *.npz in {golden_folder()}"


@having("vis/pixels")
def test_pixels_are_bit_exact(path):
    golden = golden_of(path)
    arrays = [golden[f"image_{k}"] for k in range(len(golden["vis/pixels"]))]
    pictures = [load_image(Image.fromarray(array), mode="reference") for array in arrays]
    ours = preprocess(pictures, golden.config.visual.image_size)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, golden["vis/pixels"])


@having("vis/pixels")
def test_vision_tower(path):
    golden = golden_of(path)
    ours = see(golden.model, golden["vis/pixels"])
    errors = {key: error(value, golden[key]) for key, value in ours.items() if key in golden.values}
    assert {key: e for key, e in errors.items() if e > FLOAT32} == {}


@cases()
def test_hidden_states_and_logits(path, case):
    golden = golden_of(path)
    batch = golden.batch(case)
    ours = evaluate(golden.model, batch)
    errors = {name: error(ours[name], golden[f"{case}/logits"], batch["valid"]) for name in ("scanned", "unrolled")}
    for i, hidden in enumerate(ours["hidden"]):
        if f"{case}/hidden_{i}" in golden.values:
            errors[f"hidden_{i}"] = error(hidden, golden[f"{case}/hidden_{i}"], batch["valid"])
    assert {key: e for key, e in errors.items() if e > FLOAT32} == {}


@having("bf16/logits")
def test_bfloat16(path):
    """Parameters and activations in bfloat16, the original's rounding points."""
    golden = golden_of(path)
    batch = golden.batch("full")
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), golden.model)
    assert all(hidden.dtype == jnp.bfloat16 for hidden in jax.eval_shape(hidden_states, model, batch))
    ours = jax.jit(lambda model, batch: model.logits(last_hidden(model, batch)))(model, batch)
    assert error(ours, golden["bf16/logits"], batch["valid"]) <= BFLOAT16


def full_loss(model: QwenVL, hidden: jax.Array, labels: jax.Array):
    """Cross-entropy over the logits of all positions: the formula of the original."""
    targets = labels[:, 1:]
    log_p = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets >= 0, picked, 0)), jnp.sum(targets >= 0)


def project_loss(model: QwenVL, hidden: jax.Array, labels: jax.Array, *, chunk: int):
    """The same through the training loss of the project."""
    positions = jnp.broadcast_to(jnp.arange(labels.shape[1] - 1), (labels.shape[0], labels.shape[1] - 1))
    return next_token_loss(model, hidden, positions, labels[:, 1:], chunk=chunk)


LOSSES = {
    "full": full_loss,
    "one_chunk": functools.partial(project_loss, chunk=4096),
    "chunks": functools.partial(project_loss, chunk=7),
}


@jax.jit
def train(model: QwenVL, batch: dict, labels: jax.Array):
    """Logits in training mode, and for each of LOSSES its mean value and the gradients of all parameters.

    One compiled program: the losses differ only above the last hidden state, so the layers' backward pass is shared.
    """
    hidden, backward = jax.vjp(lambda m: last_hidden(m, batch, training=True), model)

    def mean(model, hidden, loss):
        total, count = loss(model, hidden, labels)
        return total / count

    values, above, cotangents = [], [], []
    for loss in LOSSES.values():
        value, (by_model, by_hidden) = jax.value_and_grad(mean, argnums=(0, 1))(model, hidden, loss)
        values, above, cotangents = [*values, value], [*above, by_model], [*cotangents, by_hidden]
    (below,) = jax.vmap(backward)(jnp.stack(cotangents))
    gradients = [jax.tree.map(lambda a, b, i=i: a + b[i], part, below) for i, part in enumerate(above)]
    return model.logits(hidden), dict(zip(LOSSES, zip(values, gradients, strict=True), strict=True))


@functools.cache
def trained(path: Path):
    """The outcome of `train` on a file's training batch, as (logits, {loss: (value, gradients by tensor name)})."""
    golden = golden_of(path)
    logits, losses = train(golden.model, golden.batch("train", training=True), golden["train/labels"])
    return logits, {name: (value, golden.tensor_gradients(tree)) for name, (value, tree) in losses.items()}


@having("train/loss")
@pytest.mark.parametrize("loss", LOSSES)
def test_training_loss_and_gradients(path, loss):
    golden = golden_of(path)
    value, ours = trained(path)[1][loss]
    assert float(value) == pytest.approx(float(golden["train/loss"]), rel=1e-6)
    order = golden.meta["param_order"]
    assert set(order) == set(ours)

    wrong = {}
    for name, norm in zip(order, golden["train/grad_norms"], strict=True):
        mine = float(np.linalg.norm(ours[name].astype(np.float64)))
        # -1: the original keeps the parameter fixed. 0: a batch without pictures, where it runs a grey one times zero.
        if norm >= 0 and not abs(mine - norm) <= GRADIENT * norm:
            wrong[name] = (mine, float(norm))
    assert wrong == {}

    for key in (k for k in golden.values.files if k.startswith("train/grad/")):
        theirs = golden[key]
        difference = np.abs(ours[key.removeprefix("train/grad/")] - theirs).max()
        if not difference <= GRADIENT * np.abs(theirs).max():
            wrong[key] = float(difference)
    assert wrong == {}


@having("train/logits")
def test_training_logits(path):
    golden = golden_of(path)
    assert error(trained(path)[0], golden["train/logits"], golden.batch("train")["valid"]) <= FLOAT32


@having("train/eval_loss")
def test_evaluation_loss(path):
    """The training batch in evaluation mode: dynamic NTK and logn count again."""
    golden = golden_of(path)
    logits = np.asarray(evaluate(golden.model, golden.batch("train"))["scanned"], np.float64)
    targets = golden["train/labels"][:, 1:]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p[:, :-1], np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    assert -picked[targets >= 0].mean() == pytest.approx(float(golden["train/eval_loss"]), rel=1e-6)
