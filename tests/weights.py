"""What tests of weights share: comparing them bit by bit, and a checkpoint that is large and takes no room."""

import json
import math
from pathlib import Path

import numpy as np

from qwenvl_jax.checkpoints.huggingface import checkpoint_tensors
from qwenvl_jax.checkpoints.tensor_files import FolderTensors
from qwenvl_jax.config import QwenVLConfig
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


def zeros_checkpoint(folder: Path) -> tuple[int, int]:
    """A checkpoint of zeros that takes no room on the disk; the bytes of the model and of the largest tensor."""
    raw = {
        "vocab_size": 12000,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 8192,
        "visual": {
            "heads": 2,
            "image_size": 56,
            "image_start_id": 100,
            "layers": 2,
            "mlp_ratio": 2.0,
            "n_queries": 16,
            "output_dim": 1024,
            "patch_size": 14,
            "width": 64,
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    header, position, largest = {}, 0, 0
    for tensor in checkpoint_tensors(QwenVLConfig.from_hf(raw)):
        size = 2 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [position, position + size]}
        position, largest = position + size, max(largest, size)
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + position)
    return position, largest
