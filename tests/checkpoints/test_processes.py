"""Checkpoints with two real processes whose devices form one mesh."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.sharding import param_paths


def test_two_processes_load_and_save_together(fixtures, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = Path(__file__).with_name("two_processes.py")
    source = fixtures / "qwen-vl-chat-tiny"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, str(process), source, tmp_path],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == 0, output
        assert output.endswith("done\n")
    expected = param_paths(load_model(source))
    for form in ("safetensors", "orbax"):
        for path, leaf in param_paths(load_model(tmp_path / form)).items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), err_msg=path)
