"""What tests of weights share: comparing them bit by bit."""

from pathlib import Path

import numpy as np

from qwenvl_jax.checkpoints.tensor_files import FolderTensors
from qwenvl_jax.sharding import param_paths


def bits(array) -> np.ndarray:
    array = np.ascontiguousarray(np.asarray(array))
    return array.view(f"u{array.itemsize}")


def assert_same(model, other):
    """The same parameters, types and bits."""
    left, right = param_paths(model), param_paths(other)
    assert list(left) == list(right)
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(bits(leaf), bits(right[path]), err_msg=path)


def folder_tensors(folder: Path) -> dict[str, np.ndarray]:
    files = FolderTensors(folder)
    return {name: files.read(name) for name in files.names()}
