"""Run by test_huggingface.py in a process of its own: loads a checkpoint and prints how much memory that took."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from qwenvl_jax.checkpoints.huggingface import load_model


def peak() -> int:
    """Bytes in memory at most since the start (`ru_maxrss` would count the parent's at the fork)."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


folder, stacked = sys.argv[1], sys.argv[2] == "stacked"
warm_up = jax.jit(lambda x: x @ x)(jnp.ones((64, 64), jnp.bfloat16)).block_until_ready()
before = peak()
dtype, quantize = (*sys.argv[3:], None, None)[:2]
model = load_model(folder, stacked=stacked, dtype=dtype, quantize=quantize)
print(json.dumps({"took": peak() - before, "model": sum(leaf.nbytes for leaf in jax.tree.leaves(model))}))
