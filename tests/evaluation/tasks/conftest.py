"""Miniatures of all benchmarks, drawn once for all tests of readers and converters."""

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
