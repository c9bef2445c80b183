"""Saving Hugging Face folders: what was loaded comes back bit by bit, all or nothing."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from weights import assert_same, bits, folder_tensors

from qwenvl_jax.checkpoints.folder import small_files
from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.config import UserError
from qwenvl_jax.sharding import make_mesh

BIN, SAFETENSORS = "qwen-vl-chat-tiny", "qwen-vl-chat-tiny-safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", [BIN, SAFETENSORS])
def test_saving_gives_back_the_same_tensors_and_files(fixtures, tmp_path, name, stacked):
    source = fixtures / name
    save_model(load_model(source, stacked=stacked), tmp_path / "saved", **small_files(source), shard_bytes=800_000)
    before, after = folder_tensors(source), folder_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert after[tensor].dtype == value.dtype
        assert after[tensor].shape == value.shape
        np.testing.assert_array_equal(bits(after[tensor]), bits(value), err_msg=tensor)
    for other in ("generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "saved" / other).read_text()) == json.loads((source / other).read_text())
    assert (tmp_path / "saved" / "qwen.tiktoken").read_bytes() == (source / "qwen.tiktoken").read_bytes()
    config, saved = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "saved"))
    config["visual"]["n_queries"] = 256  # the original's default, which a reader may or may not spell out
    assert saved == config


def test_shards_are_as_large_as_asked_and_the_index_is_complete(fixtures, tmp_path):
    save_model(load_model(fixtures / BIN), tmp_path / "saved", shard_bytes=500_000)
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert (
        index["metadata"]["total_size"]
        == json.loads((fixtures / SAFETENSORS / INDEX).read_text())["metadata"]["total_size"]
    )
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    found = {}
    for shard in shards:
        with safe_open(shard, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
        tensors = load_file(shard)  # the library accepts what our writer wrote
        assert sum(value.nbytes for value in tensors.values()) <= 500_000
        found |= dict.fromkeys(tensors, shard.name)
    assert index["weight_map"] == found


def test_extra_keys_of_the_config_survive(fixtures, tmp_path):
    copy = shutil.copytree(fixtures / SAFETENSORS, tmp_path / "copy")
    raw = json.loads((copy / "config.json").read_text())
    raw |= {"my_note": {"kept": [1, None, "é"]}, "use_cache": False}
    raw["visual"]["my_flag"] = True
    (copy / "config.json").write_text(json.dumps(raw))
    save_model(load_model(copy), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["my_note"] == raw["my_note"]
    assert saved["use_cache"] is False
    assert saved["visual"]["my_flag"] is True


def test_a_sharded_model_of_another_type_is_saved_whole(fixtures, tmp_path):
    model = load_model(fixtures / BIN, dtype="float32", mesh=make_mesh("fsdp_tensor"), stacked=True)
    save_model(model, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir() if "safetensors" in path.name] == ["model.safetensors"]
    assert_same(load_model(tmp_path / "saved"), load_model(fixtures / BIN, dtype="float32"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "float32"


def test_nothing_is_overwritten(fixtures, tmp_path):
    model = load_model(fixtures / BIN)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(UserError, match="exists and is not empty"):
            save_model(model, tmp_path / name)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")
    load_model(tmp_path / "empty")


def test_parameters_without_a_place_are_not_dropped_silently(fixtures, tmp_path):
    model = load_model(fixtures / BIN)
    model.layers[1].up.lora_a = nnx.Param(jnp.zeros((2, 2)))
    with pytest.raises(UserError, match=r"no place for: layers\.up\.lora_a of layer 1"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_failure_half_way_leaves_nothing(fixtures, tmp_path):
    model = load_model(fixtures / BIN)
    with pytest.raises(UserError, match="cannot be written"):
        save_model(model, tmp_path / "saved", tokenizer_file=tmp_path / "absent.tiktoken")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, os, signal
from pathlib import Path
import numpy as np
from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.checkpoints.qwen_vl import Tensor
model = load_model(sys.argv[1])
left = 40
convert = Tensor.from_parameter
def counted(tensor, value):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return convert(tensor, value)
Tensor.from_parameter = counted
save_model(model, sys.argv[2], shard_bytes=300_000)
"""


def test_a_kill_half_way_leaves_no_checkpoint(fixtures, tmp_path):
    """Killed at the fortieth of 69 tensors, when some shards are whole."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(fixtures / BIN), str(tmp_path / "saved")], timeout=120)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".saved.partial-")
    assert list(left.glob("*.safetensors"))
    for folder in (left, tmp_path / "saved"):
        with pytest.raises(UserError):
            load_model(folder)
    save_model(load_model(fixtures / BIN), tmp_path / "saved")
    load_model(tmp_path / "saved")
