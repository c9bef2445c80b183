"""Loading Hugging Face folders: the fixtures bit by bit, and what is refused and how it is said."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weights import assert_same, bits, folder_tensors

from qwenvl_jax.checkpoints.huggingface import abstract_model, checkpoint_tensors, load_model, save_model
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.models.qwen_vl import unstack
from qwenvl_jax.sharding import make_mesh, param_paths, preset_rules

BIN, SAFETENSORS = "qwen-vl-chat-tiny", "qwen-vl-chat-tiny-safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(fixtures, tmp_path) -> Path:
    """A copy of the safetensors fixture to change."""
    shutil.copytree(fixtures / SAFETENSORS, tmp_path / "copy")
    return tmp_path / "copy"


def change_shard(folder: Path, shard: int, change) -> None:
    """Rewrites one shard: `change` gets its tensors by name."""
    path = folder / f"model-{shard:05}-of-00003.safetensors"
    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})


def test_bin_and_safetensors_give_the_same_bits(fixtures):
    model = load_model(fixtures / BIN)
    assert_same(model, load_model(fixtures / SAFETENSORS))
    assert len(model.layers) == 3
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_every_value_of_the_files_is_in_the_model(fixtures):
    """Against the safetensors library's own reading, by the weight table."""
    values = {}
    for shard in sorted((fixtures / SAFETENSORS).glob("*.safetensors")):
        with safe_open(shard, framework="np") as file:
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    model = load_model(fixtures / SAFETENSORS, stacked=True)
    leaves = param_paths(model)
    wanted = checkpoint_tensors(model.config)
    assert {tensor.name for tensor in wanted} == values.keys()
    for tensor in wanted:
        leaf = leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer]
        np.testing.assert_array_equal(bits(tensor.from_parameter(np.asarray(leaf))), bits(values[tensor.name]))


@pytest.mark.parametrize("preset", [None, "fsdp_tensor"])
def test_stacked_and_listed_layers_are_the_same(fixtures, preset):
    where = {} if preset is None else {"mesh": make_mesh(preset), "rules": preset_rules(preset)}
    stacked = load_model(fixtures / SAFETENSORS, stacked=True, **where)
    assert_same(unstack(stacked), load_model(fixtures / SAFETENSORS, **where))


def test_a_stack_too_large_for_the_host_is_filled_on_the_device(fixtures, tmp_path):
    """Many layers and a small vocabulary make stacks larger than the largest tensor, which takes the other way."""
    raw = json.loads((fixtures / BIN / "config.json").read_text())
    raw |= {"num_hidden_layers": 12, "vocab_size": 64}
    raw["visual"]["image_start_id"] = 20
    random = np.random.default_rng(0)
    shapes = abstract_model(QwenVLConfig.from_hf(raw), stacked=True)
    model = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.bfloat16), shapes)
    save_model(model, tmp_path / "deep")
    assert_same(load_model(tmp_path / "deep", stacked=True), model)
    on_mesh = load_model(tmp_path / "deep", stacked=True, mesh=make_mesh("fsdp_tensor"))
    assert_same(on_mesh, model)
    assert on_mesh.layers.up.kernel[...].addressable_shards[0].data.size == on_mesh.layers.up.kernel[...].size // 8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts_each_value(fixtures, dtype):
    model, stored = load_model(fixtures / BIN, dtype=dtype), load_model(fixtures / BIN)
    for path, leaf in param_paths(model).items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(param_paths(stored)[path]).astype(dtype))


def test_types_may_differ_between_tensors(copy):
    """As stored, the wider type where layers of one stack differ; float64 becomes float32."""

    def change(values):
        values["transformer.h.0.ln_1.weight"] = values["transformer.h.0.ln_1.weight"].astype(np.float32)
        values["transformer.wte.weight"] = values["transformer.wte.weight"].astype(np.float64)

    change_shard(copy, 1, change)
    listed = load_model(copy)
    assert listed.layers[0].norm_attention.scale.dtype == jnp.float32
    assert listed.layers[1].norm_attention.scale.dtype == jnp.bfloat16
    assert listed.embedding.table.dtype == jnp.float32
    assert load_model(copy, stacked=True).layers.norm_attention.scale.dtype == jnp.float32


def test_one_file_needs_no_index(fixtures, tmp_path):
    shutil.copyfile(fixtures / BIN / "config.json", tmp_path / "config.json")
    save_file(folder_tensors(fixtures / SAFETENSORS), tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path), load_model(fixtures / BIN))


def test_safetensors_are_preferred(fixtures, copy):
    for path in (fixtures / BIN).glob("pytorch_model*"):
        (copy / path.name).write_bytes(b"not read")
    assert_same(load_model(copy), load_model(fixtures / SAFETENSORS))


def test_harmless_extras_are_ignored(copy):
    def change(values):
        values["transformer.h.0.attn.masked_bias"] = np.zeros((), np.float32)
        values["transformer.rotary_emb.inv_freq"] = np.zeros(16, np.float32)

    change_shard(copy, 1, change)
    load_model(copy)


# What is refused: what to change in the folder, and what the message must say.


def drop(values):
    for name in ("transformer.h.0.ln_1.weight", "transformer.h.0.mlp.w1.weight"):
        del values[name]


def test_missing_unexpected_and_misshapen_tensors_are_listed(copy):
    index = json.loads((copy / INDEX).read_text())
    for name in ("transformer.h.0.ln_1.weight", "transformer.h.0.mlp.w1.weight"):
        del index["weight_map"][name]
    (copy / INDEX).write_text(json.dumps(index))

    def change(values):
        drop(values)
        values |= {f"extra.{i:02}": np.zeros(1, np.float32) for i in range(12)}
        values["transformer.h.0.ln_2.weight"] = np.zeros(127, np.float32)
        values["transformer.h.0.attn.c_attn.bias"] = np.zeros(384, np.int32)

    change_shard(copy, 1, change)
    with pytest.raises(UserError) as caught:
        load_model(copy)
    message = str(caught.value)
    assert str(copy) in message
    assert "2 missing: transformer.h.0.ln_1.weight, transformer.h.0.mlp.w1.weight" in message
    assert "12 unexpected: extra.00" in message
    assert "extra.09 and 2 more" in message
    assert "1 of another shape: transformer.h.0.ln_2.weight is [127], should be [128]" in message
    assert "1 not floating-point: transformer.h.0.attn.c_attn.bias is int32" in message
    assert "\n" not in message


def rewrite_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


REFUSED = {
    "a tensor that the index promises": (
        lambda folder: change_shard(folder, 1, drop),
        "index.json: lists transformer.h.0.ln_1.weight, transformer.h.0.mlp.w1.weight, which its files do not hold",
    ),
    "an absent shard": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "1 of 3 weight files are missing: model-00002-of-00003.safetensors",
    ),
    "a shard outside the folder": (
        lambda folder: rewrite_index(folder, lambda names: names.update({"lm_head.weight": "../other.safetensors"})),
        "'../other.safetensors', which is not a file of this folder",
    ),
    "a tensor in two shards": (
        lambda folder: change_shard(
            folder, 1, lambda values: values.update({"lm_head.weight": np.zeros((1536, 128), np.float32)})
        ),
        "lm_head.weight is in two files, model-00001-of-00003.safetensors and model-00003-of-00003.safetensors",
    ),
    "a truncated shard": (
        lambda folder: os.truncate(folder / "model-00003-of-00003.safetensors", 700_000),
        "model-00003-of-00003.safetensors: truncated or not a safetensors file",
    ),
    "an empty shard": (
        lambda folder: os.truncate(folder / "model-00001-of-00003.safetensors", 0),
        "model-00001-of-00003.safetensors: truncated or not a safetensors file",
    ),
    "a Git LFS pointer": (
        lambda folder: (folder / "model-00001-of-00003.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        "a Git LFS pointer, not the weights",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "no weights here; looked for model.safetensors.index.json, model.safetensors, pytorch_model.bin",
    ),
    "an index without a map": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": []}'),
        "field weight_map should map tensor names to file names",
    ),
    "an index that is not JSON": (
        lambda folder: (folder / INDEX).write_text('{\n"a":'),
        "index.json, line 2: not valid JSON",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "should hold an object"),
    "a config that is not text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        "not a text file",
    ),
    "another model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        "model_type 'llama' without a `visual` block is not a Qwen-VL model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_folder_is_refused_in_one_clear_line(copy, case):
    damage, said = REFUSED[case]
    damage(copy)
    with pytest.raises(UserError) as caught:
        load_model(copy)
    assert said in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_bin_shard_is_named(fixtures, tmp_path):
    shutil.copytree(fixtures / BIN, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / "pytorch_model-00002-of-00003.bin", 600_000)
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00003\.bin: truncated"):
        load_model(tmp_path / "copy")


def test_float16_that_cannot_hold_a_value_is_refused(copy):
    def change(values):
        values["transformer.h.0.ln_1.weight"] = np.full(128, 1e6, ml_dtypes.bfloat16)

    change_shard(copy, 1, change)
    with pytest.raises(UserError, match=r"transformer\.h\.0\.ln_1\.weight has values too large for float16"):
        load_model(copy, dtype="float16")
    load_model(copy, dtype="float32")
    with pytest.raises(UserError, match="dtype 'int4' is not one of float32, bfloat16, float16"):
        load_model(copy, dtype="int4")
