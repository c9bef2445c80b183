"""What tests of evaluation share: miniatures of all benchmarks, drawn once, and whether Java runs."""

import importlib.util
import shutil

import pytest

from qwenvl_jax.evaluation import miniature

SAMPLES = 8


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A data folder that tests only read."""
    folder = tmp_path_factory.mktemp("miniature") / "data"
    miniature.draw(folder, SAMPLES)
    return folder


@pytest.fixture
def data(drawn, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(drawn, tmp_path / "data")


@pytest.fixture
def with_java() -> None:
    """Skips where the programs that tokenise captions cannot run."""
    if shutil.which("java") is None:
        pytest.skip("there is no java")
    if importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip("pycocoevalcap is not installed")


@pytest.fixture
def no_proxy(monkeypatch) -> None:
    """Servers of tests are on this machine."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
