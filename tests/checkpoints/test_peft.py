"""Adapter folders: PEFT's own give the original's numbers, ours come back bit by bit, and wrong ones are refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TESTS
from flax import nnx
from safetensors.numpy import load_file, save_file
from weights import trained

import qwenvl_jax
from qwenvl_jax.checkpoints.adapters import add_adapters, trainable_paths
from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.checkpoints.peft import load_adapter, save_adapter
from qwenvl_jax.checkpoints.tensor_files import FolderTensors, open_tensors
from qwenvl_jax.config import UserError
from qwenvl_jax.convert import main as convert
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.models.qwen_vl import frequencies, unstack
from qwenvl_jax.nn.lora import LoraRecipe, merge_adapters, with_dropout
from qwenvl_jax.sharding import make_mesh, param_paths

FIXTURES = TESTS / "fixtures"
BASE = FIXTURES / "qwen-vl-chat-tiny"
ADAPTERS = ("lora-adapter", "lora-adapter-modules-to-save")
CASES = ("text_only", "one_image", "two_images")
FLOAT32 = 5e-5
IMAGE_START = 1470


def golden(adapter: str) -> dict[str, np.ndarray]:
    with np.load(TESTS / "golden" / "fixtures" / f"{adapter}.npz") as values:
        return {name: values[name] for name in values.files}


def pictures(ids: np.ndarray) -> list[Path]:
    """The files that the original's image spans name, byte by byte; the ids of bytes are those bytes in this model."""
    spans = [ids[start + 1 : start + 257] for start in np.flatnonzero(ids == IMAGE_START)]
    return [FIXTURES / bytes(span[span < 256].tolist()).decode() for span in spans]


@pytest.fixture(scope="module", params=ADAPTERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["adapter", "merged"])
def answers(request, name, tmp_path_factory):
    """A VLM with the adapter active, or of the folder that the command has merged, and the original's numbers."""
    if request.param == "adapter":
        vlm = qwenvl_jax.load(BASE, adapter=FIXTURES / name, image_mode="reference")
    else:
        folder = tmp_path_factory.mktemp("merged") / "model"
        assert convert([str(BASE), str(folder), "--merge-adapter", str(FIXTURES / name), "--dtype", "float32"]) == 0
        vlm = qwenvl_jax.load(folder, image_mode="reference")
    values = golden(name)
    return vlm, {k: v for k, v in values.items() if "/" in k}, request.param


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_the_original(answers, case):
    vlm, values, form = answers
    ids = values[f"{case}/input_ids"]
    logits = vlm.logits(ids, pictures(ids))[0][values[f"{case}/logits_pos"]]
    np.testing.assert_allclose(logits, values[f"{form}/{case}/logits"], atol=FLOAT32, rtol=0)
    prompts = vlm._sequences(ids[None], pictures(ids))
    generation = Generation(vlm.generator, prompts, [SamplingOptions(max_new_tokens=32)])
    tokens: list[int] = []
    while not generation.finished:
        tokens += generation.advance(8)[0]
    assert tokens == values[f"{form}/{case}/greedy"].tolist()


def test_merged_weights_are_those_of_the_original(name):
    model = merge_adapters(load_adapter(load_model(BASE, dtype="float32", stacked=True), FIXTURES / name))
    expected = {key.removeprefix("merged_weight/"): v for key, v in golden(name).items() if "merged_weight/" in key}
    assert len(expected) == 2
    kernels = {"attn.c_attn": model.layers.qkv.kernel, "mlp.w2": model.layers.gate.kernel}
    for tensor, value in expected.items():
        _, _, layer, *middle, _ = tensor.split(".")
        kernel = kernels[".".join(middle)][int(layer)]
        np.testing.assert_allclose(np.asarray(kernel).reshape(kernel.shape[0], -1).T, value, atol=1e-6, rtol=0)


def test_a_merged_folder_has_the_vocabulary_and_all_else_of_its_base(answers):
    vlm, _, form = answers
    if form == "merged":
        assert vlm.processor.tokenizer.encode_ordinary("hello") == qwenvl_jax.load(
            BASE
        ).processor.tokenizer.encode_ordinary("hello")


def test_modules_to_save_replace_the_models_own(fixtures):
    model = load_adapter(load_model(BASE, dtype="float32"), fixtures / ADAPTERS[1])
    saved = open_tensors(fixtures / ADAPTERS[1] / "adapter_model.safetensors")
    wte, head = (
        saved.read(f"base_model.model.{key}.weight").astype(np.float32) for key in ("transformer.wte", "lm_head")
    )
    np.testing.assert_array_equal(model.embedding.table[...], wte)
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)


# What we write


RECIPES = {
    "default": LoraRecipe(rank=2),
    "everything": LoraRecipe(
        rank=2, bias="all", modules_to_save=("wte", "ln_post"), use_rslora=True,
        targets=("c_attn", "mlp.c_proj", "in_proj", "out_proj", "c_fc", "kv_proj", "lm_head"),
    ),
    "dora": LoraRecipe(rank=2, use_dora=True, bias="lora_only", targets=("c_attn", "in_proj")),
}  # fmt: skip


def assert_same(model, other):
    left, right = param_paths(model), param_paths(other)
    assert list(left) == list(right)
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)


@pytest.fixture(scope="module")
def base():
    return load_model(BASE, dtype="float32", stacked=True)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_saved_adapter_comes_back_bit_by_bit(base, kind, tmp_path):
    """Saved from a stack; read into a stack, into a list and over devices."""
    adapted = trained(base, RECIPES[kind])
    save_adapter(adapted, tmp_path / "adapter", RECIPES[kind], base="the-base")
    assert_same(load_adapter(base, tmp_path / "adapter"), adapted)
    assert_same(load_adapter(unstack(base), tmp_path / "adapter"), unstack(adapted))
    save_adapter(unstack(adapted), tmp_path / "again", RECIPES[kind], base="the-base")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    if kind == "dora":
        mesh = make_mesh("fsdp_tensor")
        spread = load_adapter(
            load_model(BASE, dtype="float32", stacked=True, mesh=mesh), tmp_path / "adapter", mesh=mesh
        )
        assert_same(spread, adapted)
        assert tuple(spread.layers.qkv.b.sharding.spec) == (None, None, None, "tensor")


def test_stars_are_written_out_for_peft(base, tmp_path):
    recipe = LoraRecipe(rank=2, targets=("h.*.attn.c_attn",), modules_to_save=("ln_*",))
    save_adapter(trained(base, recipe), tmp_path / "adapter", recipe)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == [f"transformer.h.{i}.attn.c_attn" for i in range(3)]
    assert "transformer.ln_f" in settings["modules_to_save"]
    load_adapter(base, tmp_path / "adapter")


def test_nothing_is_overwritten(base, tmp_path):
    (tmp_path / "something").write_text("here")
    with pytest.raises(UserError, match="not empty"):
        save_adapter(trained(base, LoraRecipe(rank=2)), tmp_path, LoraRecipe(rank=2))


# What is refused


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(FIXTURES / ADAPTERS[1], tmp_path / "copy")
    return tmp_path / "copy"


def change_settings(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"c_attn": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"r": 8}, "should be \\[8, 128\\]"),
        ({"target_modules": ["c_attn"]}, "18 unexpected"),
        ({"target_modules": ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]}, "missing.*mlp.c_proj.lora_A"),
        ({"target_modules": ["q_proj"]}, "q_proj"),
        ({"modules_to_save": None}, "2 unexpected: base_model.model.lm_head.weight"),
        ({"r": "four"}, "adapter_config.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused(base, copy, fields, named):
    change_settings(copy, **fields)
    with pytest.raises(UserError, match=named):
        load_adapter(base, copy)


def change_weights(folder: Path, change) -> None:
    values = load_file(folder / "adapter_model.safetensors")
    change(values)
    save_file(values, folder / "adapter_model.safetensors")


def test_embeddings_that_were_not_saved_are_missed(base, copy):
    """As the original's script leaves them out of what it saves at last."""
    change_weights(copy, lambda values: [values.pop(key) for key in list(values) if "lora" not in key])
    with pytest.raises(UserError, match="2 missing.*they were not saved"):
        load_adapter(base, copy)


def test_an_adapter_where_torch_uses_none_must_do_nothing(base, tmp_path):
    """The target out_proj reaches the resampler's attention module too, which then ignores it, in torch."""
    recipe = LoraRecipe(rank=2, targets=("out_proj",))
    save_adapter(trained(base, recipe), tmp_path / "adapter", recipe)
    key = "base_model.model.transformer.visual.attn_pool.attn.out_proj.lora"
    untrained = {f"{key}_A.weight": np.ones((2, 128), np.float32), f"{key}_B.weight": np.zeros((128, 2), np.float32)}
    change_weights(tmp_path / "adapter", lambda values: values.update(untrained))
    load_adapter(base, tmp_path / "adapter")
    change_weights(
        tmp_path / "adapter", lambda values: values.update({f"{key}_B.weight": np.ones((128, 2), np.float32)})
    )
    with pytest.raises(UserError, match="2 unexpected"):
        load_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("file", "named"), [("adapter_config.json", "not an adapter folder"), ("adapter_model.safetensors", "missing")]
)
def test_a_folder_without_its_files_is_named(base, copy, file, named):
    (copy / file).unlink()
    with pytest.raises(UserError, match=named):
        load_adapter(base, copy)


def test_the_wrong_base_is_refused(base, tmp_path, capsys):
    """Of equal shapes: a merged model is another base than what it was merged from, for the command, too."""
    recipe = LoraRecipe(rank=2)
    save_adapter(trained(base, recipe), tmp_path / "adapter", recipe, base="first")
    other = merge_adapters(trained(base, recipe))
    with pytest.raises(UserError, match=r"another base model \(first\)"):
        load_adapter(other, tmp_path / "adapter")
    save_model(other, tmp_path / "other")
    command = [str(tmp_path / "other"), str(tmp_path / "merged"), "--merge-adapter", str(tmp_path / "adapter")]
    assert convert(command) == 2
    assert "another base model" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


# From training to the front door


def loss_of(model, ids):
    length = len(ids)
    context = model.context(
        jnp.tril(jnp.ones((1, length, length), bool)),
        jnp.arange(length)[None],
        jnp.asarray(frequencies(model.config, [0])),
        training=True,
    )
    logits = model.logits(model(model.embed(ids[None]), context)[0])[0, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:]).mean()


@pytest.mark.parametrize("form", ["stack", "list"])
def test_train_save_load_and_merge(base, form, tmp_path):
    """A few steps with dropout on one sentence: the loss falls, the base stays, and the files give the same model."""
    recipe = LoraRecipe(rank=4, modules_to_save=("lm_head",), loraplus_ratio=4.0, use_rslora=True)
    model = add_adapters(base if form == "stack" else unstack(base), recipe, nnx.Rngs(0))
    structure, leaves = jax.tree.structure(model), param_paths(model)
    names = trainable_paths(model, recipe)
    moving, frozen = ({k: v for k, v in leaves.items() if (k in names) == wanted} for wanted in (True, False))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 1200, 24))
    optimizer = optax.adam(3e-3)

    def rebuild(moving):
        return jax.tree.unflatten(structure, [(moving | frozen)[path] for path in leaves])

    @jax.jit
    def step(moving, memory, key):
        loss, grads = jax.value_and_grad(lambda moving: loss_of(with_dropout(rebuild(moving), key), ids))(moving)
        updates, memory = optimizer.update(grads, memory)
        return optax.apply_updates(moving, updates), memory, loss

    memory, losses = optimizer.init(moving), []
    for number in range(8):
        moving, memory, loss = step(moving, memory, jax.random.fold_in(jax.random.key(0), number))
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    model = rebuild(moving)
    before = param_paths(base if form == "stack" else unstack(base))
    for path, leaf in param_paths(model).items():
        if path not in names:
            np.testing.assert_array_equal(leaf, before[path.replace(".base.", ".")], err_msg=path)

    save_adapter(model, tmp_path / "adapter", recipe, base=BASE)
    vlm = qwenvl_jax.load(BASE, adapter=tmp_path / "adapter")
    logits = qwenvl_jax.VLM(model, vlm.processor).logits(ids)
    np.testing.assert_array_equal(vlm.logits(ids), logits)
    assert np.abs(logits - qwenvl_jax.load(BASE).logits(ids)).max() > 0.1
    command = [str(BASE), str(tmp_path / "merged"), "--merge-adapter", str(tmp_path / "adapter"), "--dtype", "float32"]
    assert convert(command) == 0
    np.testing.assert_allclose(qwenvl_jax.load(tmp_path / "merged").logits(ids), logits, atol=FLOAT32, rtol=0)
    untouched = "transformer.visual.conv1.weight"
    original = FolderTensors(BASE).read(untouched).astype(np.float32)
    np.testing.assert_array_equal(FolderTensors(tmp_path / "merged").read(untouched), original)
