"""Preference tuning: the loss of pairs that share a row is that of each answer alone; runs learn and resume."""

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from qwenvl_jax.checkpoints.folder import locate, read_config, small_files
from qwenvl_jax.checkpoints.huggingface import save_model
from qwenvl_jax.config import UserError
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.record_batches import BatchRecipe, RecordBatches
from qwenvl_jax.data.records import Record, open_records
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies
from qwenvl_jax.nn import row_attention
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.training.optimizer import OptimizerRecipe
from qwenvl_jax.training.placement import MeshRecipe
from qwenvl_jax.training.preference import DpoRecipe, preference_losses, preference_objective
from qwenvl_jax.training.recipe import NewModel, Recipe, RecordsRecipe, read_recipe
from qwenvl_jax.training.record_rows import record_hidden
from qwenvl_jax.training.run import train
from qwenvl_jax.training.step import TrainState, batch_loss, make_train_step, named_parameters

VOCABULARY = "qwenvl_jax/assets/tiny/qwen.tiktoken"
SHAPE = NewModel(
    layers=1, hidden_size=128, heads=2, intermediate_size=64, image_size=16, patch_size=8, vision_width=16,
    vision_layers=1, vision_heads=2, n_queries=4, seq_length=64,
)  # fmt: skip
DPO = DpoRecipe(beta=0.3, label_smoothing=0.1, sft_weight=0.2)


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer.from_file(VOCABULARY, SHAPE.n_queries)
    return Processor(tokenizer, SHAPE.config(tokenizer.image_start_id))


@pytest.fixture(scope="module")
def model(processor):
    return QwenVL(processor.config, rngs=nnx.Rngs(0))


def pair(number: int, pictures: int, turns: int = 1) -> Record:
    rng = np.random.default_rng(number)
    shown = [Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)) for _ in range(pictures)]
    messages = []
    for turn in range(turns):
        asked = [{"type": "text", "text": "what is here? " * (1 + number % 2)}]
        if turn == 0:
            asked = [{"type": "image", "image": picture} for picture in shown] + asked
        answer = f"a red cross and {number + turn} circles"
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    # It begins as the liked answer does: what is shared by chance is not shared in the row.
    return Record(messages, f"memory:{number + 1}", rejected="a red star" + " and blue" * (number % 3))


PAIRS = [pair(0, 0), pair(1, 1), pair(2, 2, turns=2)]
REFERENCE = np.random.default_rng(0).normal(-20, 3, (len(PAIRS) + 1, 2)).astype(np.float32)


def log_probs_alone(model, processor, record: Record) -> list[tuple[jax.Array, int]]:
    """Log-probability of chosen and rejected answer, each from a conversation of its own, and its number of tokens."""
    found = []
    for answer in (record.messages[-1]["content"], record.rejected):
        messages = [*record.messages[:-1], {"role": "assistant", "content": answer}]
        prompt, labels = processor.training(messages, answers_only=True)
        learnt = np.flatnonzero(labels != IGNORED)
        answered = np.split(learnt, 1 + np.flatnonzero(np.diff(learnt) > 1))[-1]  # not those of earlier turns
        assert labels[answered[-1]] == processor.tokenizer.im_end_id
        length = len(labels)
        context = model.context(
            causal_mask(jnp.ones((1, length), bool)),
            jnp.arange(length)[None],
            frequencies(model.config, [0]),
            training=True,
        )
        features = model.encode_images(prompt.pixels) if len(prompt.pixels) else None
        hidden, _ = model(model.embed(prompt.input_ids[None], features, prompt.image_slots[None]), context)
        log_p = jax.nn.log_softmax(model.logits(hidden[0]))
        found.append((jnp.sum(log_p[answered - 1, labels[answered]]), len(answered)))
    return found


def loss_alone(model, processor):
    """Mean loss of all pairs in plain terms, and the log-probabilities."""
    total, every = 0.0, []
    for (chosen, rejected), reference in zip(
        [log_probs_alone(model, processor, record) for record in PAIRS], REFERENCE, strict=False
    ):
        odds = DPO.beta * ((chosen[0] - reference[0]) - (rejected[0] - reference[1]))
        kept = 1 - DPO.label_smoothing
        total += kept * jnp.log1p(jnp.exp(-odds)) + (1 - kept) * jnp.log1p(jnp.exp(odds))
        total -= DPO.sft_weight * chosen[0] / chosen[1]
        every.append(jnp.stack([chosen[0], rejected[0]]))
    return total / len(PAIRS), jnp.stack(every)


@pytest.fixture(scope="module")
def batches(processor):
    return RecordBatches(BatchRecipe(max_length=140), Mixture([PAIRS]), processor, rows=2, epochs=1, pairs=True)


@pytest.fixture(scope="module")
def alone(model, processor):
    """Loss, log-probabilities and gradients of all pairs, one answer after another."""
    return jax.jit(jax.value_and_grad(loss_alone, has_aux=True), static_argnums=1)(model, processor)


@pytest.mark.parametrize("block", [512, 32], ids=["rows", "rows in blocks"])
def test_pairs_in_a_row_equal_answers_alone(model, batches, alone, monkeypatch, block):
    monkeypatch.setattr(row_attention, "BLOCK_BOUNDS", (block, block))
    assert len(batches) == 1
    assert max(len(row) for row in batches.plan[0][1]) >= 2
    batch = batches[0]
    batch["reference"] = REFERENCE[batch["record"]]
    objective = preference_objective(DPO)

    def packed(model):
        hidden_of = partial(record_hidden, longest=batches.longest)
        total, _, sums = batch_loss({"model": model}, batch, hidden_of=hidden_of, objective=objective)
        return total / objective.units(batch), sums

    (loss, sums), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(model)
    (expected, log_p), expected_grads = alone
    np.testing.assert_allclose([sums["logps/chosen"], sums["logps/rejected"]], log_p.sum(axis=0), rtol=2e-6)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))


def test_smaller_batches_add_up_and_frozen_parts_stay(model, batches):
    """Every pair counts alike, though one row has two and the other one."""
    whole = batches[0]
    whole["reference"] = REFERENCE[whole["record"]]
    assert sorted(np.sum(whole["record"] >= 0, axis=1)) == [1, 2]
    pixels = whole.pop("pixels")
    together = jax.tree.map(lambda x: x[None], whole | {"pixels": pixels})
    apart = jax.tree.map(lambda x: x[:, None], whole) | {"pixels": np.stack([pixels, pixels])}
    every, rebuild = named_parameters({"model": model})
    frozen = {path: value for path, value in every.items() if path.startswith("model.visual.vit.")}
    params = {path: value for path, value in every.items() if path not in frozen}
    optimizer = optax.sgd(1.0)
    hidden_of = partial(record_hidden, longest=batches.longest)
    objective = preference_objective(DPO)
    step = jax.jit(make_train_step(rebuild, optimizer, jnp.zeros_like, hidden_of=hidden_of, objective=objective))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    (expected, metrics), (found, found_metrics) = (step(state, frozen, batch) for batch in (together, apart))
    assert metrics.keys() == found_metrics.keys() >= {"loss", "rewards/accuracies", "logps/chosen", "target_tokens"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5), found_metrics, metrics)
    moved = {path for path, value in found.params.items() if not np.array_equal(value, params[path])}
    assert {"model.visual.resampler.query", "model.lm_head.kernel"} <= moved
    for path, value in expected.params.items():
        change = np.abs(value - params[path]).max()
        np.testing.assert_allclose(found.params[path], value, atol=2e-5 * change + 1e-7, err_msg=path)


def test_the_loss_is_equation_7_in_double_precision():
    """Over rows of two pairs and one, with answers of unlike lengths; what is no pair does not count."""
    rng = np.random.default_rng(0)
    batch = {
        "target_positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
        "targets": rng.integers(0, 9, (2, 8), np.int32),
        "target_answer": np.array([[0, 0, 0, 1, 2, 2, 3, 0], [0, 1, 1, 0, 0, 0, 0, 0]], np.int32),
        "record": np.array([[4, 7], [2, -1]], np.int32),
        "reference": rng.normal(-5, 2, (2, 2, 2)).astype(np.float32),
    }
    batch["targets"][0, 7:] = batch["targets"][1, 3:] = IGNORED
    hidden = rng.normal(size=(2, 8, 9)).astype(np.float32)
    total, sums = preference_losses(DPO, SimpleNamespace(logits=lambda hidden: hidden), hidden, batch)

    wide = hidden.astype(np.float64)
    log_p = wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))
    answers = {(0, 0): [0, 1, 2], (0, 1): [3], (0, 2): [4, 5], (0, 3): [6], (1, 0): [0], (1, 1): [1, 2]}
    summed = {
        key: sum(log_p[key[0], place, batch["targets"][key[0], place]] for place in where)
        for key, where in answers.items()
    }
    losses, margins = [], []
    for row, m in ((0, 0), (0, 1), (1, 0)):
        chosen, rejected = summed[row, 2 * m], summed[row, 2 * m + 1]
        margin = 0.3 * ((chosen - batch["reference"][row, m, 0]) - (rejected - batch["reference"][row, m, 1]))
        sigmoid = 1 / (1 + np.exp(-margin))
        loss = -0.9 * np.log(sigmoid) - 0.1 * np.log(1 - sigmoid) - 0.2 * chosen / len(answers[row, 2 * m])
        losses.append(loss)
        margins.append(margin)
    np.testing.assert_allclose(total, sum(losses), rtol=1e-6)
    np.testing.assert_allclose(sums["rewards/margins"], sum(margins), rtol=1e-5)
    assert sums["rewards/accuracies"] == sum(margin > 0 for margin in margins)
    np.testing.assert_allclose(sums["rewards/chosen"] - sums["rewards/rejected"], sum(margins), rtol=1e-5)
    assert preference_objective(DPO).units(batch) == 3


@pytest.fixture(scope="module")
def files(tmp_path_factory, model) -> Path:
    """A folder of a small model to start from, and pairs to learn and to hold out, two in three with a picture."""
    folder = tmp_path_factory.mktemp("preference")
    save_model(model, folder / "start", **small_files(locate("tiny")))
    for number in range(2):
        pair(1 + 2 * number, 1).messages[0]["content"][0]["image"].save(folder / f"{number}.png")
    for name, numbers in (("train", range(24)), ("held", range(24, 32))):
        rows = []
        for number in numbers:
            row = {"question": f"Say {number}.", "answer": "yes", "rejected": "no, never" if number % 4 else "no"}
            rows.append(row | ({"image": f"{number % 3}.png"} if number % 3 < 2 else {}))
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return folder


def recipe_of(files: Path, output: Path, **changes) -> Recipe:
    plain = Recipe(
        output=str(output),
        start=str(files / "start"),
        dpo=DpoRecipe(),
        records=RecordsRecipe(
            files=(str(files / "train.json"),),
            validation=(str(files / "held.json"),),
            batches=BatchRecipe(max_length=64),
        ),
        optimizer=OptimizerRecipe(name="adamw", learning_rate=0.01, warmup_steps=1, weight_decay=0.0),
        steps=4,
        batch_size=8,
        log_every=1,
        evaluate_every=4,
        evaluate_samples=0,
        save_every=2,
        export_dtype="float32",
    )
    return dataclasses.replace(plain, **changes)


def logged(output: Path, kind: str = "train") -> list[dict]:
    """The step of each row and what was learnt there; not how long it took."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "rewards/", "logps/", "right/", "gradient_norm", "learning_rate")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows if row["kind"] == kind]


ADAPTER = {"lora": LoraRecipe(rank=4, dropout=0.0)}
WAYS = {"full": {}, "lora": ADAPTER}


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.long)])
def way(request):
    return request.param


@pytest.fixture(scope="module")
def run(files, way) -> Path:
    """The folder of an undisturbed run."""
    output = files / way
    assert train(recipe_of(files, output, **WAYS[way])) is not None
    return output


def test_a_run_learns_to_prefer(run):
    steps, (held,) = logged(run), logged(run, "evaluation")
    assert steps[0].keys() >= {"loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the model is its own reference
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["rewards/accuracies"] == 1
    assert steps[-1]["rewards/margins"] > steps[1]["rewards/margins"] > 0
    assert held["rewards/accuracies"] == held["right/pairs"] == 1
    assert held["loss"] < 0.6
    assert held["rewards/margins"] > 0.1


def test_the_reference_is_the_model_without_the_adapter(run, files, model, processor):
    """The kept numbers, after a run that trained, are what the start says of each pair alone."""
    records = open_records(str(files / "train.json"))
    known = np.load(run / "reference.npy")
    assert known.shape == (len(records) + 1, 2)
    some = [0, 1, 2, 23]
    expected = jax.jit(lambda model: [log_probs_alone(model, processor, records[index]) for index in some])(model)
    np.testing.assert_allclose(known[some], [[log_p for log_p, _ in pair] for pair in expected], rtol=2e-6)


@pytest.mark.parametrize("way", ["lora"], indirect=True)
def test_a_killed_run_resumes_bit_for_bit_with_the_same_reference(run, files, way, tmp_path):
    """What a kill between steps 2 and 4 leaves: the state of step 2, and a log that is ahead of it."""
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    exported = "model-4/model.safetensors" if way == "full" else "adapter-4/adapter_model.safetensors"
    shutil.rmtree((killed / exported).parent)
    shutil.rmtree(killed / "checkpoints" / "4")
    before = (killed / "reference.npy").stat().st_mtime_ns
    train(recipe_of(files, killed, **WAYS[way]))
    assert (killed / exported).read_bytes() == (run / exported).read_bytes()
    assert logged(killed) == logged(run)
    assert logged(killed, "evaluation") == logged(run, "evaluation")
    assert (killed / "reference.npy").stat().st_mtime_ns == before


@pytest.mark.long
@pytest.mark.parametrize("way", ["lora"], indirect=True)
def test_a_mesh_takes_the_same_steps(run, files, way, tmp_path):
    recipe = recipe_of(files, tmp_path, mesh=MeshRecipe("fsdp"), evaluate_every=9, **WAYS[way])
    recipe = dataclasses.replace(recipe, records=dataclasses.replace(recipe.records, validation=()))
    train(recipe)
    for found, expected in zip(logged(tmp_path), logged(run), strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


def test_a_record_without_a_rejected_answer_is_named(processor):
    alone = dataclasses.replace(PAIRS[0], rejected=None)
    same = dataclasses.replace(PAIRS[1], rejected=PAIRS[1].messages[-1]["content"])
    records = Mixture([[alone, same, PAIRS[2]]])
    with pytest.raises(UserError, match=r"2 records .*memory:1: rejected: missing; .*memory:2: rejected: the same as"):
        RecordBatches(BatchRecipe(max_length=190), records, processor, rows=1, epochs=1, pairs=True)
    recipe = BatchRecipe(max_length=190, bad_records="skip")
    batches = RecordBatches(recipe, records, processor, rows=1, epochs=1, pairs=True)
    assert batches[0]["record"].tolist() == [[2]]
    assert len(batches.skipped) == 2


def test_the_pairs_that_the_documentation_draws(monkeypatch, tmp_path):
    """The program in docs/training.md runs, and what it writes can be trained on."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "pairs/" in block]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    processor = Processor.from_folder(locate("tiny"), read_config(locate("tiny")))
    for name, count in (("train", 100), ("val", 32)):
        pairs = Mixture([open_records(f"pairs/{name}.json")])
        batches = RecordBatches(BatchRecipe(max_length=512), pairs, processor, rows=4, epochs=1, pairs=True)
        assert sum(batches.counts(number)["records"] for number in range(len(batches))) == count


def test_a_pair_is_never_cut(processor):
    records = Mixture([[PAIRS[0], pair(5, 0, turns=4)]])
    batches = RecordBatches(BatchRecipe(max_length=100), records, processor, rows=1, epochs=1, pairs=True)
    assert [place for number in range(len(batches)) for place in batches.where(number)] == ["memory:1"]
    assert "more than max_length 100" in batches.skipped[0]


@pytest.mark.parametrize("field", ["beta: 0", "label_smoothing: 0.5", "sft_weight: -1"])
def test_slips_in_the_recipe_are_named(field, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"start: tiny\nrecords: {{files: [a.json]}}\ndpo: {{{field}}}\n")
    with pytest.raises(UserError, match=rf"recipe\.yaml: dpo\.{field.split(':')[0]} is"):
        read_recipe(path)


def test_preferences_need_records_and_a_start():
    with pytest.raises(UserError, match="dpo goes with a checkpoint and records"):
        Recipe(dpo=DPO, start="tiny")
    with pytest.raises(UserError, match=r"records\.template is 'raw'"):
        Recipe(dpo=DPO, start="tiny", records=RecordsRecipe(template="raw"))
