"""Telling one base model from another, so that an adapter is not put on the wrong one. See `peft.py`."""

import hashlib

import jax
import ml_dtypes
import numpy as np

from qwenvl_jax.checkpoints.adapters import Parameters, all_tensors, saved_tensors
from qwenvl_jax.checkpoints.huggingface import host_value
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.lora import LoraRecipe

Fingerprint = dict[str, str | None]

ROWS = 8  # of each array that are looked at


def base_fingerprint(model: QwenVL, recipe: LoraRecipe) -> Fingerprint:
    """{"linear": ..., "other": ...}: a hash of the linear maps' weights, and one of all other parameters.

    Both cover the names and shapes of all tensors and a few rows of each that the recipe does not train, rounded to
    bfloat16, so that a checkpoint has the same in each float type. "linear" is None where maps are quantised: such a
    model is known by the rest of it. Adapters on the model do not count.
    """
    tensors, parameters = all_tensors(model.config), Parameters(model)
    trained = {tensor.name for tensor in saved_tensors(model.config, recipe)}
    kernels = {tensor.path for tensor in tensors if tensor.path.endswith(".kernel")}
    shapes = "\n".join(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors).encode()
    linear, other, dense = hashlib.sha256(shapes), hashlib.sha256(shapes), True
    for tensor in tensors:
        stem = tensor.path.removesuffix(".bias")
        if tensor.name in trained or (stem != tensor.path and f"{stem}.kernel" in kernels):
            continue  # biases of quantised maps are kept with these, so those of no map count
        found = parameters.find(tensor)
        if found is None:
            dense = False
        else:
            sample = _sample(parameters.leaves[found[0]], found[1])
            (linear if tensor.path in kernels else other).update(sample)
    return {"linear": linear.hexdigest()[:32] if dense else None, "other": other.hexdigest()[:32]}


def same_base(left: Fingerprint, right: Fingerprint) -> bool:
    """Whether two fingerprints can be of one model: what both of them know must be equal."""
    return all(left.get(key) in (None, value) or value is None for key, value in right.items())


def _sample(leaf: jax.Array, layer: int | None) -> bytes:
    """A few rows of an array, or of one layer of a stack; vectors whole."""
    shape = leaf.shape if layer is None else leaf.shape[1:]
    rows = np.linspace(0, shape[0] - 1, ROWS).astype(np.int32) if len(shape) > 1 else None
    value = host_value(_rows(leaf, layer, rows), None).astype(ml_dtypes.bfloat16)
    # Below this, float16 does not hold every value that bfloat16 does.
    return np.where(np.abs(value) < 2.0**-14, 0, value).astype(ml_dtypes.bfloat16).tobytes()


@jax.jit
def _rows(leaf: jax.Array, layer: jax.Array | None, rows: jax.Array | None) -> jax.Array:
    if layer is None:
        return leaf if rows is None else leaf[rows]
    return leaf[layer] if rows is None else leaf[layer, rows]
