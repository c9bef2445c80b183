"""What tests of evaluation share."""

import importlib.util
import shutil

import pytest


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
