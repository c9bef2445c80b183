"""Qwen-VL checkpoints in the Hugging Face layout: folder to model and model to folder, no PyTorch involved.

Loading goes tensor by tensor straight into each parameter's sharding, so the host never holds more than the model plus
the largest tensor. Not here: what the tensors are called (`qwen_vl.py`) and how files are read (`tensor_files.py`).
"""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.checkpoints.qwen_vl import Tensor, is_harmless_extra, tensors
from qwenvl_jax.checkpoints.tensor_files import FolderTensors, read_json, some
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.models.qwen_vl import QwenVL, unstack
from qwenvl_jax.sharding import ShardingRules, param_paths, param_shardings, split_layer

FLOATS = ("float32", "bfloat16", "float16")


def read_config(folder: Path) -> QwenVLConfig:
    """The folder's `config.json`. Raises UserError naming the file and what is wrong with it."""
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw or (folder / "quantize_config.json").is_file():
        raise UserError(f"{folder}: a quantised checkpoint (GPTQ); int4 checkpoints are not supported yet")
    try:
        return QwenVLConfig.from_hf(raw)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def abstract_model(config: QwenVLConfig, *, stacked: bool) -> QwenVL:
    """The model with shapes in place of arrays."""
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0)))
    return model if stacked else jax.eval_shape(unstack, model)


def checkpoint_tensors(config: QwenVLConfig) -> list[Tensor]:
    """The tensors that a checkpoint of this configuration consists of."""
    shapes = param_paths(abstract_model(config, stacked=True))
    return tensors(config, {path: leaf.shape for path, leaf in shapes.items()})


def check_tensors(wanted: list[Tensor], files: FolderTensors) -> None:
    """Raises UserError listing what is missing, unexpected, misshapen or not a floating-point tensor."""
    names = set(files.names())
    if any(name.endswith(".qweight") for name in names):
        raise UserError(f"{files.folder}: a quantised checkpoint (GPTQ); int4 checkpoints are not supported yet")
    missing = [t.name for t in wanted if t.name not in names]
    unexpected = sorted(name for name in names - {t.name for t in wanted} if not is_harmless_extra(name))
    misshapen, not_float = [], []
    for tensor in wanted:
        if tensor.name in names:
            shape, dtype = files.describe(tensor.name)
            if shape != tensor.shape:
                misshapen.append(f"{tensor.name} is {list(shape)}, should be {list(tensor.shape)}")
            if dtype.name not in (*FLOATS, "float64"):
                not_float.append(f"{tensor.name} is {dtype.name}")
    problems = [
        f"{len(found)} {what}: {some(found)}"
        for what, found in [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not floating-point", not_float),
        ]
        if found
    ]
    if problems:
        raise UserError(f"{files.folder}: the weights do not fit config.json. Tensors " + "; ".join(problems))


def load_model(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    stacked: bool = False,
) -> QwenVL:
    """The model of a checkpoint folder.

    dtype: "float32", "bfloat16" or "float16"; default as stored. mesh, rules: where the parameters go; default one
    device. stacked: one scanned stack of layers (training) instead of a list of layers (inference).
    Raises UserError if the folder is incomplete, damaged, or holds other tensors than its config.json calls for.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    config = read_config(folder)
    files = FolderTensors(folder)
    wanted = checkpoint_tensors(config)
    check_tensors(wanted, files)
    model = abstract_model(config, stacked=stacked)
    shardings = {} if mesh is None else param_paths(param_shardings(model, mesh, rules))
    sources: dict[str, list[Tensor]] = {}
    for tensor in wanted:
        sources.setdefault(tensor.path, []).append(tensor)
    # A stack that is no larger than this may be put together on the host, which compiles nothing.
    largest = max(math.prod(tensor.shape) for tensor in wanted)

    def parameter(path: str) -> jax.Array:
        base, layer = split_layer(path)
        parts = [tensor for tensor in sources[base] if layer in (None, tensor.layer)]
        if len(parts) * math.prod(parts[0].shape) > largest:
            return _stack_on_device(files, parts, dtype, shardings.get(path))
        is_stack = parts[0].layer is not None and layer is None
        return _from_host(files, parts, dtype, shardings.get(path), stacked=is_stack)

    return jax.tree.unflatten(jax.tree.structure(model), [parameter(path) for path in param_paths(model)])


def _target_dtype(files: FolderTensors, parts: list[Tensor], dtype: str | None) -> np.dtype:
    """What the parameter is to be: `dtype`, else as stored, and the wider one where the layers of a stack differ."""
    stored = jnp.result_type(*(files.describe(part.name)[1] for part in parts)) if dtype is None else np.dtype(dtype)
    return np.dtype(np.float32) if stored == np.float64 else stored


def _read(files: FolderTensors, part: Tensor, dtype: np.dtype) -> np.ndarray:
    """One tensor in the parameter's dtype and shape, transposed as a view: the copy to the device is faster at it."""
    value = files.read(part.name)
    if value.dtype != dtype:
        with np.errstate(over="ignore"):
            converted = value.astype(dtype)
        if dtype == np.float16 and np.isinf(converted).any() and not np.isinf(value).any():
            raise UserError(f"{files.folder}: {part.name} has values too large for float16; use bfloat16")
        value = converted
    return part.to_parameter(value)


def _place(value: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """The array on its devices, finished before the next tensor is read."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(value))
    return jax.block_until_ready(jax.make_array_from_callback(value.shape, sharding, value.__getitem__))


def _from_host(
    files: FolderTensors, parts: list[Tensor], dtype: str | None, sharding: NamedSharding | None, *, stacked: bool
) -> jax.Array:
    """A parameter from its one tensor, or a small stack from those of its layers."""
    target = _target_dtype(files, parts, dtype)
    if not stacked:
        return _place(_read(files, parts[0], target), sharding)
    stack = np.empty((len(parts), *parts[0].parameter_shape), target)
    for layer, part in enumerate(parts):
        stack[layer] = _read(files, part, target)
    return _place(stack, sharding)


def _stack_on_device(
    files: FolderTensors, parts: list[Tensor], dtype: str | None, sharding: NamedSharding | None
) -> jax.Array:
    """A stack of layers, allocated once in its sharding and filled in place layer by layer."""
    target = _target_dtype(files, parts, dtype)
    shape = (len(parts), *parts[0].parameter_shape)
    layer_sharding = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jax.jit(partial(jnp.zeros, shape, target), out_shardings=sharding)()
    for layer, part in enumerate(parts):
        stack = _fill(stack, _place(_read(files, part, target), layer_sharding), layer)
    return jax.block_until_ready(stack)


@partial(jax.jit, donate_argnums=0)
def _fill(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
