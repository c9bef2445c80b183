"""Putting a Qwen-VL together from a language model and a vision transformer; tests/parity runs the latter in torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from weights import folder_tensors, language_folder, openclip_folder

from qwenvl_jax.checkpoints.assemble import VISUAL, assemble, main
from qwenvl_jax.checkpoints.folder import read_config
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import UserError

VISION = {"width": 64, "layers": 2, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 14, "image_size": 56}


@pytest.fixture(scope="module")
def language(fixtures, tmp_path_factory) -> Path:
    source = fixtures / "qwen-vl-chat-tiny-safetensors"
    return language_folder(source, tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return openclip_folder(tmp_path_factory.mktemp("vision"), VISION)


@pytest.fixture(scope="module")
def assembled(language, vision, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assembled") / "new"
    assert main([str(language), str(vision), str(folder), "--image-size", "112"]) == 0
    return folder


def test_the_folder_is_a_checkpoint_of_the_two(assembled, language, vision):
    config = read_config(assembled)
    assert (config.visual.width, config.visual.layers, config.visual.heads) == (64, 2, 4)
    assert (config.visual.image_size, config.visual.output_dim) == (112, config.hidden_size)
    load_model(assembled)
    made, words = folder_tensors(assembled), folder_tensors(language)
    for name, value in words.items():
        assert made[name].tobytes() == value.tobytes(), name
    dtype = made["lm_head.weight"].dtype
    clip = folder_tensors(vision, "open_clip_model.safetensors")
    same = ("conv1.weight", "ln_pre.bias", "transformer.resblocks.1.mlp.c_fc.weight")
    for name in same:
        np.testing.assert_array_equal(made[VISUAL + name], clip[f"visual.{name}"].astype(dtype))
    places = clip["visual.positional_embedding"][1:].astype(dtype)
    np.testing.assert_array_equal(made[f"{VISUAL}positional_embedding"], places)
    head = 2  # its queries, keys and values stand together, in OpenCLIP each in its third
    fused, thirds = (t.astype(np.float32) for t in (
        made[f"{VISUAL}transformer.resblocks.0.attn.in_proj.weight"],
        clip["visual.transformer.resblocks.0.attn.in_proj_weight"].astype(dtype),
    ))  # fmt: skip
    np.testing.assert_array_equal(fused[head * 48 + 16 : head * 48 + 32], thirds[64 + head * 16 : 64 + head * 16 + 16])


def test_the_resampler_is_new_and_follows_the_seed(assembled, language, vision, tmp_path):
    assemble(language, vision, tmp_path / "same", image_size=112)
    assemble(language, vision, tmp_path / "other", image_size=112, seed=1)
    name = f"{VISUAL}attn_pool.query"
    first, same, other = (folder_tensors(f)[name] for f in (assembled, tmp_path / "same", tmp_path / "other"))
    assert first.tobytes() == same.tobytes() != other.tobytes()
    assert 0.01 < first.astype(np.float32).std() < 0.03


def test_what_does_not_fit_is_named(language, vision, fixtures, tmp_path):
    with pytest.raises(UserError, match="not an OpenCLIP folder"):
        assemble(language, language, tmp_path / "x")
    with pytest.raises(UserError, match="is a Qwen-VL already"):
        assemble(fixtures / "qwen-vl-chat-tiny", vision, tmp_path / "x")
    with pytest.raises(UserError, match="image_size 60 is not a multiple of patch_size 14"):
        assemble(language, vision, tmp_path / "x", image_size=60)
    shallow = openclip_folder(tmp_path / "shallow", VISION, claims={"layers": 3})
    with pytest.raises(UserError, match=r"missing: transformer\.visual\.transformer\.resblocks\.2"):
        assemble(language, shallow, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_mistyped_command_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "qwenvl_jax.checkpoints.assemble", "nowhere", "nowhere", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("assemble: nowhere: no such checkpoint folder")
    assert done.stderr.count("\n") == 1
