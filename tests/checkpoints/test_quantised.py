"""Quantising while loading, and folders of quantised weights that this project writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights import assert_same, zeros_checkpoint

import qwenvl_jax
from qwenvl_jax.checkpoints import orbax
from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.config import UserError
from qwenvl_jax.convert import main
from qwenvl_jax.models.quantised import FORMS, Quantisation, dequantise, quantise
from qwenvl_jax.models.qwen_vl import unstack
from qwenvl_jax.sharding import make_mesh, param_paths

TINY, SAFETENSORS = "qwen-vl-chat-tiny", "qwen-vl-chat-tiny-safetensors"


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_quantising_while_loading_is_quantising_what_is_loaded(fixtures, form, stacked):
    """In the same types, whatever type the rest is asked for in."""
    loaded = load_model(fixtures / TINY, quantize=form, stacked=stacked)
    assert_same(loaded, quantise(load_model(fixtures / TINY, stacked=stacked), Quantisation(form)))
    wide = param_paths(load_model(fixtures / TINY, quantize=form, stacked=stacked, dtype="float32"))
    for path, leaf in param_paths(loaded).items():
        if path.rpartition(".")[2] in ("codes", "step", "middle"):
            np.testing.assert_array_equal(leaf, wide[path], err_msg=path)


@pytest.mark.parametrize("form", FORMS)
def test_quantising_on_a_mesh(fixtures, form):
    split = load_model(fixtures / TINY, quantize=form, stacked=True, mesh=make_mesh("fsdp_tensor"))
    whole = param_paths(load_model(fixtures / TINY, quantize=form, stacked=True))
    for path, leaf in param_paths(split).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_allclose(
                np.asarray(leaf, np.float32), np.asarray(whole[path], np.float32), rtol=1e-6, err_msg=path
            )
        else:
            np.testing.assert_array_equal(leaf, whole[path], err_msg=path)
    codes = split.layers.down.codes[...]
    assert codes.addressable_shards[0].data.size == codes.size // 8


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_converted_folder_holds_the_same_quantised_weights(fixtures, tmp_path, form, capsys):
    source, folder = fixtures / TINY, tmp_path / "new"
    assert main([str(source), str(folder), "--quantize", form]) == 0
    assert f"linear maps, {form}" in " ".join(capsys.readouterr().out.split())
    expected = load_model(source, quantize=form)
    assert_same(load_model(folder), expected)
    assert_same(unstack(load_model(folder, stacked=True)), expected)
    greedy = {"temperature": 0, "max_new_tokens": 8}
    vlm, direct = qwenvl_jax.load(folder), qwenvl_jax.load(source, quantize=form)
    assert vlm.generate("hello", **greedy).text == direct.generate("hello", **greedy).text
    # A second conversion changes nothing.
    assert main([str(folder), str(tmp_path / "again")]) == 0
    assert_same(load_model(tmp_path / "again"), expected)


def test_int8_tensors_are_as_documented(fixtures, tmp_path):
    save_model(load_model(fixtures / SAFETENSORS, quantize="int8"), tmp_path / "new")
    values = load_file(tmp_path / "new" / "model.safetensors")
    floats = {}
    for shard in (fixtures / SAFETENSORS).glob("*.safetensors"):
        floats |= load_file(shard)
    name = "transformer.h.1.attn.c_attn"
    weight, scale = values[f"{name}.weight"], values[f"{name}.weight_scale"]
    assert (weight.dtype, scale.dtype) == (np.int8, np.float32)
    original = floats[f"{name}.weight"].astype(np.float32)
    assert (np.abs(weight * scale[:, None] - original) <= scale[:, None] * 0.5001).all()
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qwenvl_jax_int8"


def test_what_no_folder_can_hold_is_refused(fixtures, tmp_path):
    nf4 = load_model(fixtures / TINY, quantize="nf4")
    with pytest.raises(UserError, match="nf4 weights are not written to folders"):
        save_model(nf4, tmp_path / "new")
    with pytest.raises(UserError, match="quantised weights are written as safetensors"):
        orbax.save_model(nf4, tmp_path / "new")
    some = quantise(load_model(fixtures / TINY), Quantisation("int8"))
    some.layers[0].up = load_model(fixtures / TINY).layers[0].up
    with pytest.raises(UserError, match="14 linear maps of 15 quantised"):
        save_model(some, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dequantised_model_is_saved_as_a_float_one(fixtures, tmp_path):
    for name in (TINY, "qwen-vl-chat-tiny-int4"):
        quantised = load_model(fixtures / name, dtype="float32", **({"quantize": "nf4"} if name == TINY else {}))
        save_model(dequantise(quantised), tmp_path / name)
        again = load_model(tmp_path / name)
        for layer, wanted in zip(again.layers, quantised.layers, strict=True):
            np.testing.assert_array_equal(layer.qkv.kernel[...], wanted.qkv.dequantised(jnp.float32))
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())


def test_biases_that_a_float_folder_has_no_place_for_are_not_lost(fixtures, tmp_path):
    model = dequantise(load_model(fixtures / "qwen-vl-chat-tiny-int4-descact"))
    with pytest.raises(UserError, match=r"no place for: .*out\.bias"):
        save_model(model, tmp_path / "new")


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_no_numbers_are_named(fixtures, tmp_path, form):
    copy = shutil.copytree(fixtures / SAFETENSORS, tmp_path / "copy")
    name = "transformer.h.2.mlp.w2.weight"
    for shard in copy.glob("*.safetensors"):
        values = load_file(shard)
        if name in values:
            values[name] = values[name].copy()
            values[name][3, 5] = np.nan
            save_file(values, shard)
    with pytest.raises(UserError, match=rf"{name} has values that {form} cannot hold"):
        load_model(copy, quantize=form)


def test_mistakes_in_one_line(fixtures, tmp_path, capsys):
    with pytest.raises(UserError, match="quantize 'int3' is not one of int8, int4, nf4"):
        qwenvl_jax.load(fixtures / TINY, quantize="int3")
    assert main([str(fixtures / TINY), str(tmp_path / "new"), "--quantize", "int8", "--format", "orbax"]) == 2
    assert "leave out --format orbax" in capsys.readouterr().err
    orbax.save_model(load_model(fixtures / TINY), tmp_path / "orbax")
    with pytest.raises(UserError, match="convert the folder to safetensors"):
        load_model(tmp_path / "orbax", quantize="int8")


def test_memory_while_quantising(tmp_path):
    """Never the whole model in its own type: the quantised one, and room to work on one linear map."""
    size, largest = zeros_checkpoint(tmp_path / "zeros")
    script = Path(__file__).with_name("loading_memory.py")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "zeros", "list", "bfloat16", "int4"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["model"] < 0.5 * size
    kernel = 3 * 1024 * 1024 * 4  # the largest linear map in float32; rounding and packing hold a few of its size
    assert measured["took"] < measured["model"] + largest + 6 * kernel + 40e6  # the last for imports and compiling
