"""GPTQ's int4 tensors as AutoGPTQ stores them (Frantar et al. 2022 is the method, the layout is that tool's).

A linear map `X` of the float model, in -> out, is there as

    X.qweight  int32 [in / 8, out]      eight rows a word, the first in the lowest four bits
    X.qzeros   int32 [groups, out / 8]  eight outputs a word, each the zero point minus one
    X.scales   float [groups, out]
    X.g_idx    int32 [in]               the group of each row
    X.bias     float [out]              also where the float model has none

and W[i, o] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o]). Not here: reading whole folders (`quantised.py`) and
the error-compensating search for q that gave the method its name; we round to nearest.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwenvl_jax.checkpoints.qwen_vl import Tensor
from qwenvl_jax.checkpoints.tensor_files import FolderTensors
from qwenvl_jax.config import UserError
from qwenvl_jax.models.quantised import Quantisation

METHOD = "gptq"
WORD = np.dtype("<i4")


def read_block(block: Mapping[str, Any], where: str) -> Quantisation:
    """What a `quantization_config` says. Raises UserError naming file and field for what is not supported."""
    supported = {"bits": (4,), "checkpoint_format": (None, "gptq"), "is_marlin_format": (None, False)}
    for field, values in supported.items():
        if block.get(field) not in values:
            raise UserError(f"{where}: {field} is {block.get(field)!r}; GPTQ is read with {field} {values[-1]!r}")
    group_size, ordered = block.get("group_size"), block.get("desc_act", False)
    if not isinstance(group_size, int) or isinstance(group_size, bool) or not (group_size == -1 or group_size > 1):
        raise UserError(f"{where}: group_size is {group_size!r}; it should be a number of rows, or -1 for one group")
    if not isinstance(ordered, bool):
        raise UserError(f"{where}: desc_act is {ordered!r}; it should be true or false")
    return Quantisation("int4", group_size, ordered)


def write_block(quantisation: Quantisation) -> dict[str, Any]:
    """The `quantization_config` of what `Int4Linear.quantise` makes and `read_block` reads."""
    return {
        "quant_method": METHOD,
        "bits": 4,
        "group_size": quantisation.group_size,
        "desc_act": quantisation.ordered,
        "static_groups": False,
        "sym": True,
        "true_sequential": False,
        "damp_percent": 0.01,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }


def scale_name(module: str) -> str:
    return f"{module}.scales"


def groups(weight: Tensor, quantisation: Quantisation) -> tuple[int, int]:
    """Rows that share a scale, and how many such groups there are."""
    in_dim = weight.shape[1]
    size = in_dim if quantisation.group_size == -1 else quantisation.group_size
    return size, -(-in_dim // size)


def scale_shape(weight: Tensor, quantisation: Quantisation) -> tuple[int, ...]:
    return (groups(weight, quantisation)[1], weight.shape[0])


def integers(weight: Tensor, quantisation: Quantisation) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the integer tensors of a linear map by name. Raises UserError for sizes that do not pack."""
    (out, in_dim), module = weight.shape, weight.module
    if out % 8 or in_dim % 8:
        raise UserError(f"{module}: {in_dim} inputs and {out} outputs; int4 packs eight together, so use int8")
    return {
        f"{module}.qweight": ((in_dim // 8, out), WORD),
        f"{module}.qzeros": ((groups(weight, quantisation)[1], out // 8), WORD),
        f"{module}.g_idx": ((in_dim,), WORD),
    }


def read(files: FolderTensors, weight: Tensor, quantisation: Quantisation) -> dict[str, np.ndarray]:
    """The parts of an `Int4Linear`, in the shapes that it has there."""
    module, out = weight.module, weight.parameter_shape[1:]
    codes = _bytes(files.read(f"{module}.qweight")).transpose(0, 2, 1).reshape(-1, weight.shape[0])
    zero = _bytes(files.read(f"{module}.qzeros"))
    zero = np.stack([zero & 15, zero >> 4], axis=-1).reshape(len(zero), -1) + 1
    parts = {"codes": codes, "scale": files.read(scale_name(module)), "zero": zero.astype(np.uint8)}
    order = _order(files, f"{module}.g_idx", groups(weight, quantisation)[0], quantisation.ordered)
    if order is not None:
        parts["codes"] = _pack(_unpack(codes)[order])
    parts = {name: part.reshape(-1, *out) for name, part in parts.items()}
    return parts if order is None else parts | {"order": order.astype(np.int32)}


def _order(files: FolderTensors, name: str, size: int, ordered: bool) -> np.ndarray | None:
    """The rows sorted by group; None where they are and must be sorted already."""
    group = files.read(name)
    order = np.argsort(group, kind="stable") if ordered else np.arange(len(group))
    if not np.array_equal(group[order], np.arange(len(group)) // size):
        kind = "" if ordered else ", or desc_act should be true"
        raise UserError(f"{files.folder}: {name} does not put {size} rows in each group, as group_size says{kind}")
    return order if ordered else None


def tensors(parts: Mapping[str, np.ndarray], weight: Tensor, quantisation: Quantisation) -> dict[str, np.ndarray]:
    """The inverse of `read`: the tensors of a linear map by name."""
    module, (out, in_dim) = weight.module, weight.shape
    codes, scale, zero = (parts[name].reshape(-1, out) for name in ("codes", "scale", "zero"))
    group = (np.arange(in_dim) // groups(weight, quantisation)[0]).astype(WORD)
    if "order" in parts:
        place = np.argsort(parts["order"])
        codes, group = _pack(_unpack(codes)[place]), group[place]
    stored = (zero - 1) & 15
    return {
        f"{module}.qweight": _words(codes.reshape(-1, 4, out).transpose(0, 2, 1)),
        f"{module}.qzeros": _words((stored[:, 0::2] | (stored[:, 1::2] << 4)).reshape(len(stored), -1, 4)),
        f"{module}.g_idx": group,
        scale_name(module): scale,
    }


def _bytes(words: np.ndarray) -> np.ndarray:
    """int32 [...] -> uint8 [..., 4], the lowest first."""
    return np.ascontiguousarray(words, WORD).view(np.uint8).reshape(*words.shape, 4)


def _words(lowest_first: np.ndarray) -> np.ndarray:
    """The inverse of `_bytes`."""
    return np.ascontiguousarray(lowest_first, np.uint8).view(WORD)[..., 0]


def _unpack(codes: np.ndarray) -> np.ndarray:
    """uint8 [in / 2, out], two rows a byte -> [in, out]."""
    return np.stack([codes & 15, codes >> 4], axis=1).reshape(-1, codes.shape[1])


def _pack(q: np.ndarray) -> np.ndarray:
    """The inverse of `_unpack`."""
    return q[0::2] | (q[1::2] << 4)
