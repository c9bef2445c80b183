"""What loading holds in memory: the model and its largest tensor, no more."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_jax.checkpoints.huggingface import checkpoint_tensors
from qwenvl_jax.config import QwenVLConfig


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


@pytest.mark.parametrize(("form", "dtype"), [("stacked", "bfloat16"), ("list", "float32")])
def test_memory_is_the_model_and_the_largest_tensor(tmp_path, form, dtype):
    size, largest = zeros_checkpoint(tmp_path / "zeros")
    if dtype == "float32":
        size, largest = 2 * size, 2 * largest
    script = Path(__file__).with_name("loading_memory.py")
    # The C library gives freed blocks above this size back at once, so that the process is as large as what it holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "zeros", form, dtype],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["model"] == size
    assert size * 0.9 < measured["took"] < size + largest + 20e6  # the last for what loading imports and compiles
