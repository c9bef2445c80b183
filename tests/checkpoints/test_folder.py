"""Finding a checkpoint by name and writing a folder all or nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.checkpoints.folder import locate, new_folder
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import UserError


def test_a_folder_is_itself(fixtures, monkeypatch):
    assert locate(fixtures / "qwen-vl-chat-tiny") == fixtures / "qwen-vl-chat-tiny"
    monkeypatch.chdir(fixtures)
    assert locate("qwen-vl-chat-tiny") == Path("qwen-vl-chat-tiny")


def test_a_misspelt_name_gets_a_suggestion(fixtures, tmp_path):
    with pytest.raises(UserError) as caught:
        locate(fixtures / "qwen-vl-chat-tny")
    assert f"did you mean {fixtures / 'qwen-vl-chat-tiny'}" in str(caught.value)
    with pytest.raises(UserError, match=r"gigantic: no such checkpoint folder$"):
        locate("gigantic")
    with pytest.raises(UserError, match="did you mean tiny"):
        locate("tinny")
    with pytest.raises(UserError, match=r"no such checkpoint folder$"):
        locate(tmp_path / "nowhere" / "at" / "all")


def test_what_is_no_checkpoint_folder_is_told_apart(fixtures, tmp_path):
    with pytest.raises(UserError, match="a file; name the checkpoint folder"):
        locate(fixtures / "qwen-vl-chat-tiny" / "config.json")
    with pytest.raises(UserError, match=r"it has no config\.json$"):
        locate(tmp_path)
    with pytest.raises(UserError, match=r"it has no config\.json; these have one: .*qwen-vl-chat-tiny,"):
        locate(fixtures)


HUB = """
import sys
from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.config import UserError
try:
    print(locate("Owner/Some-Model"))
except UserError as error:
    print("UserError:", error)
"""


def ask_hub(cache: Path) -> str:
    """What `locate` says of a hub name, in a process of its own that has this cache and no network."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    environment = os.environ | {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_name_is_found_in_the_local_cache(fixtures, tmp_path):
    repository = tmp_path / "models--Owner--Some-Model"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    shutil.copytree(fixtures / "qwen-vl-chat-tiny", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert ask_hub(tmp_path) == str(snapshot)
    # A download that was broken off, and no network to complete it: loading then names the missing file.
    (snapshot / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"missing: pytorch_model-00002-of-00003\.bin"):
        load_model(ask_hub(tmp_path))


def test_a_hub_name_without_a_network_is_one_clear_line(tmp_path):
    said = ask_hub(tmp_path)
    assert said.startswith("UserError: Owner/Some-Model: no such folder, and the Hugging Face hub did not give it")
    assert "\n" not in said


def test_a_new_folder_appears_when_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "a").read_text() == "a"
    assert os.listdir(tmp_path / "deep") == ["new"]


def test_a_new_folder_does_not_appear_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new") as folder:  # noqa: PT012 (both are needed)
        (folder / "a").write_text("a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "file" / "new"):
        pass
