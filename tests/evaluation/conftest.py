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
