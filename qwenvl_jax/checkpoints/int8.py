"""This project's own layout of int8 weights in a folder.

A linear map `X` of the float model, in -> out, is there as

    X.weight        int8 [out, in]   -127..127
    X.weight_scale  float [out]

and W[i, o] = weight[o, i] * weight_scale[o]. The functions are those of `gptq.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwenvl_jax.checkpoints.qwen_vl import Tensor
from qwenvl_jax.checkpoints.tensor_files import FolderTensors
from qwenvl_jax.config import UserError
from qwenvl_jax.models.quantised import Quantisation

METHOD = "qwenvl_jax_int8"


def read_block(block: Mapping[str, Any], where: str) -> Quantisation:
    """What a `quantization_config` says. Raises UserError naming file and field for what is not supported."""
    if block.get("bits") != 8:
        raise UserError(f"{where}: bits is {block.get('bits')!r}; {METHOD} has 8")
    return Quantisation("int8")


def write_block(quantisation: Quantisation) -> dict[str, Any]:
    """The `quantization_config` that `read_block` reads."""
    return {"quant_method": METHOD, "bits": 8, "layout": "weight int8 [out, in] times weight_scale [out]"}


def scale_name(module: str) -> str:
    return f"{module}.weight_scale"


def scale_shape(weight: Tensor, quantisation: Quantisation) -> tuple[int, ...]:
    return (weight.shape[0],)


def integers(weight: Tensor, quantisation: Quantisation) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the integer tensors of a linear map by name."""
    return {weight.name: (weight.shape, np.dtype(np.int8))}


def read(files: FolderTensors, weight: Tensor, quantisation: Quantisation) -> dict[str, np.ndarray]:
    """The parts of an `Int8Linear`, in the shapes that it has there."""
    scale = files.read(scale_name(weight.module)).reshape(weight.parameter_shape[1:])
    return {"codes": weight.to_parameter(files.read(weight.name)), "scale": scale}


def tensors(parts: Mapping[str, np.ndarray], weight: Tensor, quantisation: Quantisation) -> dict[str, np.ndarray]:
    """The inverse of `read`: the tensors of a linear map by name."""
    return {weight.name: weight.from_parameter(parts["codes"]), scale_name(weight.module): parts["scale"].reshape(-1)}
