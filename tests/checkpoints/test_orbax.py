"""Orbax folders: round trips between formats, forms and meshes; what is refused; the command that converts."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwenvl_jax.checkpoints import orbax
from qwenvl_jax.checkpoints.folder import locate, small_files
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.checkpoints.tensor_files import FolderTensors
from qwenvl_jax.config import UserError
from qwenvl_jax.convert import main
from qwenvl_jax.sharding import make_mesh, param_paths, param_shardings, preset_rules

TINY = "qwen-vl-chat-tiny"


def assert_same(model, other):
    left, right = param_paths(model), param_paths(other)
    assert list(left) == list(right)
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[path]), err_msg=path)


@pytest.fixture(scope="module")
def saved(fixtures, tmp_path_factory):
    """The fixture in Orbax's format, written from eight devices."""
    folder = tmp_path_factory.mktemp("orbax") / "saved"
    model = load_model(fixtures / TINY, mesh=make_mesh("fsdp"), rules=preset_rules("fsdp"), stacked=True)
    orbax.save_model(model, folder, **small_files(fixtures / TINY))
    return folder


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("preset", [None, "fsdp_tensor", "tensor"])
def test_restores_on_another_mesh(fixtures, saved, preset, stacked):
    where = {} if preset is None else {"mesh": make_mesh(preset), "rules": preset_rules(preset)}
    model = load_model(saved, stacked=stacked, **where)
    assert_same(model, load_model(fixtures / TINY, stacked=stacked))
    if preset is not None:
        wanted = param_paths(param_shardings(model, **where))
        for path, leaf in param_paths(model).items():
            assert leaf.sharding == wanted[path], path


def test_a_list_of_layers_is_saved_as_well(fixtures, saved, tmp_path):
    orbax.save_model(load_model(fixtures / TINY), tmp_path / "saved")
    assert_same(load_model(tmp_path / "saved", stacked=True), load_model(saved, stacked=True))


def test_converts_the_dtype(fixtures, saved):
    assert_same(load_model(saved, dtype="float32"), load_model(fixtures / TINY, dtype="float32"))


def test_the_folder_is_a_checkpoint_folder_like_the_others(fixtures, saved):
    assert locate(saved) == saved
    theirs, ours = small_files(fixtures / TINY), small_files(saved)
    assert ours["generation_config"] == theirs["generation_config"]
    assert ours["tokenizer_config"] == theirs["tokenizer_config"]
    assert ours["tokenizer_file"].read_bytes() == theirs["tokenizer_file"].read_bytes()


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder, **values):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | values))


def test_weights_that_do_not_fit_the_config_are_listed(copy):
    change_config(copy, vocab_size=1600)
    with pytest.raises(
        UserError, match=r"2 of another shape: embedding\.table is \[1536, 128\], should be \[1600, 128\]"
    ):
        load_model(copy)


def test_other_parameters_than_the_models_are_listed(fixtures, tmp_path):
    from orbax.checkpoint import v1 as ocp

    shutil.copyfile(fixtures / TINY / "config.json", tmp_path / "config.json")
    leaves = param_paths(load_model(fixtures / TINY, stacked=True))
    ocp.save(tmp_path / "orbax", {"extra" if path == "lm_head.kernel" else path: leaf for path, leaf in leaves.items()})
    with pytest.raises(UserError, match=r"1 missing: lm_head\.kernel; 1 unexpected: extra"):
        load_model(tmp_path)


def test_damaged_weights_are_one_clear_line(copy):
    def refused():
        with pytest.raises(UserError, match="orbax: damaged or incomplete") as caught:
            load_model(copy)
        assert "\n" not in str(caught.value)

    files = [path for path in (copy / "orbax").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    refused()
    shutil.rmtree(copy / "orbax")
    (copy / "orbax").mkdir()
    refused()


def test_nothing_is_overwritten(fixtures, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        orbax.save_model(load_model(fixtures / TINY), tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


# The command


def test_there_and_back_gives_the_same_bits(fixtures, tmp_path, capsys):
    assert main([str(fixtures / TINY), str(tmp_path / "orbax"), "--format", "orbax"]) == 0
    assert main([str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    before, after = FolderTensors(fixtures / TINY), FolderTensors(tmp_path / "back")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        one, other = before.read(name), after.read(name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.ascontiguousarray(one).view(np.uint16), other.view(np.uint16))
    said = capsys.readouterr().out
    for fact in ("69", "1,100,480", "2,200,960", "bfloat16"):
        assert fact in said


def test_converts_to_another_type(fixtures, tmp_path):
    assert main([str(fixtures / TINY), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    model = load_model(tmp_path / "wide")
    assert_same(model, load_model(fixtures / TINY, dtype="float32"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float32"}


def test_mistakes_are_one_line_and_status_2(fixtures, tmp_path, capsys):
    source = str(fixtures / TINY)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    mistakes = {
        "no such checkpoint folder; did you mean": [source + "y", str(tmp_path / "new")],
        "exists and is not empty": [source, str(tmp_path / "taken")],
        "the same folder": [source, str(fixtures / "images" / ".." / TINY)],
    }
    for said, arguments in mistakes.items():
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("qwenvl-convert: ")
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as caught:
        main([source, str(tmp_path / "new"), "--format", "onnx"])
    assert caught.value.code == 2


KILLED = """
import os, signal, sys
from qwenvl_jax.checkpoints import orbax
orbax.write_small_files = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
from qwenvl_jax.convert import main
main([sys.argv[1], sys.argv[2], "--format", "orbax"])
"""


def test_a_kill_half_way_leaves_no_checkpoint(fixtures, tmp_path):
    """Killed when the weights are there and the rest is not."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(fixtures / TINY), str(tmp_path / "saved")], timeout=120)
    assert done.returncode == -9
    assert (tmp_path / "saved" / "orbax").is_dir()
    with pytest.raises(UserError, match=r"it has no config\.json"):
        locate(tmp_path / "saved")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_model(tmp_path / "saved")
