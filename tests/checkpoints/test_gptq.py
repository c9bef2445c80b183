"""GPTQ folders against the original's numbers: weights, logits, greedy tokens; and folders that do not fit."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import TESTS
from safetensors.numpy import load_file, save_file
from weights import assert_same, bits, folder_tensors

import qwenvl_jax
from qwenvl_jax.checkpoints import gptq
from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.checkpoints.qwen_vl import Tensor
from qwenvl_jax.checkpoints.tensor_files import FolderTensors
from qwenvl_jax.config import UserError
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.models.quantised import Quantisation, quantised_linears
from qwenvl_jax.models.qwen_vl import unstack
from qwenvl_jax.nn.quantised import Int4Linear
from qwenvl_jax.sharding import make_mesh, param_paths, param_shardings, preset_rules

GOLDEN = TESTS / "golden" / "fixtures"
PLAIN, ORDERED = "qwen-vl-chat-tiny-int4", "qwen-vl-chat-tiny-int4-descact"
LOGITS = 5e-5  # absolute, float32
LINEARS = np.load(GOLDEN / "gptq_linear_cases.npz")
SHARD = "model-00001-of-00002.safetensors"


def single(tmp_path, case: str) -> tuple[FolderTensors, Tensor, Quantisation]:
    """A folder with one linear map of the golden file."""
    names = ("qweight", "qzeros", "scales", "g_idx")
    save_file({f"x.{name}": LINEARS[f"{case}/{name}"] for name in names}, tmp_path / "model.safetensors")
    in_dim, out = LINEARS[f"{case}/dequant_in_out"].shape
    weight = Tensor("x.weight", (out, in_dim), "layers.up.kernel", 0, "linear", (in_dim, out))
    return FolderTensors(tmp_path), weight, Quantisation("int4", int(LINEARS[f"{case}/group_size"]), "desc" in case)


@pytest.mark.parametrize("case", LINEARS["names"])
def test_single_linear_maps(tmp_path, case):
    files, weight, quantisation = single(tmp_path, case)
    parts = gptq.read(files, weight, quantisation)
    size = gptq.groups(weight, quantisation)[0]
    map_ = Int4Linear(**{n: jnp.asarray(p) for n, p in parts.items()}, axes=("embed", "mlp"), group_size=size)
    np.testing.assert_array_equal(map_.dequantised(jnp.float32), LINEARS[f"{case}/dequant_in_out"])
    y = map_(jnp.asarray(LINEARS[f"{case}/x"])) + LINEARS[f"{case}/bias"]
    np.testing.assert_allclose(y, LINEARS[f"{case}/y"], atol=1e-5)
    written = gptq.tensors(parts, weight, quantisation)
    assert written.keys() == set(files.names())
    for name, value in written.items():
        assert value.dtype == files.read(name).dtype
        np.testing.assert_array_equal(value, files.read(name), err_msg=name)


@pytest.fixture(scope="module", params=[PLAIN, ORDERED])
def case(request):
    """The name of a folder, the model behind the front door, and what the original computes."""
    vlm = qwenvl_jax.load(TESTS / "fixtures" / request.param, image_mode="reference")
    return request.param, vlm, np.load(GOLDEN / f"{request.param}.npz")


def prompt_of(vlm, golden, name):
    ids = golden[f"{name}/input_ids"]
    starts = np.flatnonzero(ids == vlm.config.visual.image_start_id) + 1
    end = vlm.processor.tokenizer.image_pad_id
    names = [bytes(ids[start : start + list(ids[start:]).index(end)].tolist()).decode() for start in starts]
    return ids, [TESTS / "fixtures" / name for name in names]


@pytest.mark.parametrize("name", ["text_only", "one_image", "two_images"])
def test_logits(case, name):
    _, vlm, golden = case
    logits = vlm.logits(*prompt_of(vlm, golden, name))
    np.testing.assert_allclose(logits[0, golden[f"{name}/logits_pos"]], golden[f"{name}/logits"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name", ["text_only", "two_images"])
def test_greedy_tokens_of_the_compiled_decode(case, name):
    _, vlm, golden = case
    ids, pictures = prompt_of(vlm, golden, name)
    (prompt,) = vlm._sequences(ids[None], pictures)
    generation = Generation(vlm.generator, [prompt], [SamplingOptions(max_new_tokens=32)])
    reply = []
    while not generation.finished:
        reply += generation.advance(8)[0]
    np.testing.assert_array_equal(reply, golden[f"{name}/greedy"])


def test_weights_and_biases(case):
    """Dequantised weights exactly. Biases that are zero are left out, the others are there."""
    folder, _, golden = case
    model = load_model(TESTS / "fixtures" / folder)
    maps = {"attn.c_proj": "out", "mlp.w1": "up"}
    for key in (key for key in golden.files if key.startswith("dequant/")):
        _, _, layer, name = key.split(".", 3)
        map_ = getattr(model.layers[int(layer)], maps[name])
        np.testing.assert_array_equal(np.asarray(map_.dequantised(jnp.float32)).T, golden[key])
    assert len(quantised_linears(model)) == 5 * 3
    assert ("layers.0.out.bias" in param_paths(model)) == (folder == ORDERED)
    assert ("layers.0.out.order" in param_paths(model)) == (folder == ORDERED)


@pytest.mark.parametrize("folder", [PLAIN, ORDERED])
def test_saving_gives_back_the_same_tensors(fixtures, tmp_path, folder):
    save_model(load_model(fixtures / folder, stacked=folder == PLAIN), tmp_path / "saved")
    before, after = folder_tensors(fixtures / folder), folder_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        np.testing.assert_array_equal(bits(after[name]), bits(value), err_msg=name)
    config, saved = (json.loads((f / "config.json").read_text()) for f in (fixtures / folder, tmp_path / "saved"))
    for key in ("bits", "group_size", "desc_act", "sym", "quant_method"):
        assert saved["quantization_config"][key] == config["quantization_config"][key], key
    assert_same(load_model(tmp_path / "saved"), load_model(fixtures / folder))


def test_stacked_and_on_a_mesh(fixtures):
    listed = load_model(fixtures / ORDERED)
    stacked = load_model(fixtures / ORDERED, stacked=True)
    assert_same(unstack(stacked), listed)
    where = {"mesh": make_mesh("fsdp_tensor"), "rules": preset_rules("fsdp_tensor")}
    split = load_model(fixtures / ORDERED, stacked=True, **where)
    assert_same(split, stacked)
    wanted = param_paths(param_shardings(split, **where))
    for path, leaf in param_paths(split).items():
        assert leaf.sharding == wanted[path], path
    codes = split.layers.qkv.codes[...]
    assert codes.addressable_shards[0].data.size == codes.size // 8


@pytest.fixture
def copy(fixtures, tmp_path):
    return shutil.copytree(fixtures / ORDERED, tmp_path / "copy")


def change(folder, **changes):
    """Tensors of the first shard, by the last parts of their names; None removes one."""
    values = load_file(folder / SHARD)
    for ending, value in changes.items():
        name = f"transformer.h.0.mlp.w1.{ending}"
        if value is None:
            del values[name]
        else:
            values[name] = value
    save_file(values, folder / SHARD)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != SHARD} | dict.fromkeys(values, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED = {
    "missing": ({"qzeros": None}, "1 missing: transformer.h.0.mlp.w1.qzeros"),
    "one bias missing": ({"bias": None}, "1 missing: transformer.h.0.mlp.w1.bias"),
    "unexpected": ({"weight": np.zeros(1, np.float16)}, "1 unexpected: transformer.h.0.mlp.w1.weight"),
    "misshapen": ({"qweight": np.zeros((8, 256), np.int32)}, "qweight is [8, 256], should be [16, 256]"),
    "scales": ({"scales": np.zeros((2, 256), np.float16)}, "scales is [2, 256], should be [4, 256]"),
    "type": ({"qweight": np.zeros((16, 256), np.int16)}, "qweight is int16, should be int32"),
    "groups": ({"g_idx": np.zeros(128, np.int32)}, "g_idx does not put 32 rows in each group"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_do_not_fit_are_named(copy, name):
    changes, said = REFUSED[name]
    change(copy, **changes)
    with pytest.raises(UserError) as caught:
        load_model(copy)
    assert said in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


BLOCKS = {
    "bits": ({"bits": 3}, "bits is 3; GPTQ is read with bits 4"),
    "method": ({"quant_method": "awq"}, "quant_method is 'awq'; there are gptq, qwenvl_jax_int8"),
    "layout": ({"checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq_v2'"),
    "group_size": ({"group_size": "all"}, "group_size is 'all'"),
    "desc_act": ({"desc_act": False}, "or desc_act should be true"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_description_that_is_not_understood_is_refused(copy, name):
    changes, said = BLOCKS[name]
    raw = json.loads((copy / "config.json").read_text())
    raw["quantization_config"] |= changes
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        load_model(copy)
    assert said in str(caught.value)
    assert str(copy) in str(caught.value)


def test_the_description_may_be_in_a_file_of_its_own(copy, fixtures):
    raw = json.loads((copy / "config.json").read_text())
    del raw["quantization_config"]
    (copy / "config.json").write_text(json.dumps(raw))
    assert_same(load_model(copy), load_model(fixtures / ORDERED))
    (copy / "quantize_config.json").unlink()
    with pytest.raises(UserError, match=r"the tensors are GPTQ's, but config\.json has no quantization_config"):
        load_model(copy)


def test_scales_keep_their_type_and_the_rest_takes_the_one_asked_for(fixtures):
    leaves = param_paths(load_model(fixtures / PLAIN, dtype="bfloat16"))
    assert leaves["layers.0.qkv.scale"].dtype == np.float16
    assert leaves["layers.0.qkv.bias"].dtype == ml_dtypes.bfloat16
    assert leaves["embedding.table"].dtype == ml_dtypes.bfloat16


def test_what_is_quantised_cannot_be_quantised_otherwise(fixtures):
    with pytest.raises(UserError, match="is quantised already, as int4; it cannot become nf4"):
        load_model(fixtures / PLAIN, quantize="nf4")
    assert_same(load_model(fixtures / PLAIN, quantize="int4"), load_model(fixtures / PLAIN))
