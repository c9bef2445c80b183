"""The command that draws miniatures: the same for a seed, other for another, and never over what is there."""

import filecmp
import subprocess
import sys

import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import miniature
from qwenvl_jax.evaluation.task import Reading
from qwenvl_jax.evaluation.tasks.registry import TASKS


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_seed_decides_everything(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        miniature.draw(tmp_path / name, samples=2, seed=seed)
    names = files(tmp_path / "a")
    assert names == files(tmp_path / "b")
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[1:] == ([], [])
    assert len(filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", names, shallow=False)[1]) > len(names) / 2


@pytest.mark.parametrize("samples", [1, 13])
def test_any_number_of_samples(samples, tmp_path):
    miniature.draw(tmp_path / "data", samples)
    for name in ("flickr", "okvqa_val", "refcocog_val", "scienceqa_test_img", "ocrbench"):
        assert len(list(TASKS[name].read(tmp_path / "data", Reading()))) == samples
    for name in TASKS:
        if name != "scenes":
            assert list(TASKS[name].read(tmp_path / "data", Reading()))


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder; name a new one"):
        miniature.draw(tmp_path)
    command = [sys.executable, "-m", "qwenvl_jax.evaluation.miniature", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert files(tmp_path)[0].name == "mine.txt"
