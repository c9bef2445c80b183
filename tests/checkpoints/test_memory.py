"""What loading holds in memory: the model and its largest tensor, no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from weights import zeros_checkpoint


@pytest.mark.parametrize(("form", "dtype"), [("stacked", "bfloat16"), ("list", "float32")])
def test_memory_is_the_model_and_the_largest_tensor(tmp_path, form, dtype):
    size, largest = zeros_checkpoint(tmp_path / "zeros")
    if dtype == "float32":
        size, largest = 2 * size, 2 * largest
    script = Path(__file__).with_name("loading_memory.py")
    # The C library gives freed blocks above this size back at once, so that the process is as large as what it holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    # As users have it: tests keep small programs, too, and to write those takes memory that loading does not.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
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
