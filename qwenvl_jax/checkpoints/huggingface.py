"""Qwen-VL checkpoints in the Hugging Face layout: folder to model and model to folder, no PyTorch involved.

Loading goes tensor by tensor straight into each parameter's sharding, so the host never holds more than the model plus
the largest tensor. Not here: what the tensors are called (`qwen_vl.py`) and how files are read (`tensor_files.py`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.checkpoints.folder import (
    QUANTIZATION_CONFIG,
    SmallFiles,
    check_free,
    new_folder,
    read_config,
    write_json,
    write_small_files,
)
from qwenvl_jax.checkpoints.qwen_vl import Tensor, is_harmless_extra, tensors
from qwenvl_jax.checkpoints.tensor_files import FolderTensors, NamedTensors, some, write_safetensors
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.models.quantised import quantised_linears
from qwenvl_jax.models.qwen_vl import QwenVL, unstack
from qwenvl_jax.sharding import ShardingRules, param_paths, param_shardings, split_layer

FLOATS = ("float32", "bfloat16", "float16")
FLOATS_IN = (*FLOATS, "float64")  # of tensors that are read
SHARD_BYTES = 5_000_000_000  # of a weight file, unless one tensor is larger
ORBAX = "orbax"  # the subfolder of a checkpoint whose weights are in Orbax's format


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")


def abstract_model(config: QwenVLConfig, *, stacked: bool) -> QwenVL:
    """The model with shapes in place of arrays."""
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0)))
    if not stacked:
        model = jax.eval_shape(unstack, model)
        model.config = config  # a cached trace returns the config that it saw, which may differ in `extra`
    return model


def checkpoint_tensors(config: QwenVLConfig) -> list[Tensor]:
    """The tensors that a checkpoint of this configuration consists of."""
    shapes = param_paths(abstract_model(config, stacked=True))
    return tensors(config, {path: leaf.shape for path, leaf in shapes.items()})


def check_tensors(
    wanted: list[Tensor], files: NamedTensors, integers: Mapping[str, tuple[tuple[int, ...], np.dtype]] | None = None
) -> None:
    """Raises UserError listing what is missing, unexpected, misshapen or not of its type.

    wanted: floating-point tensors; integers: shape and dtype of the others by name.
    """
    names = set(files.names())
    described: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {t.name: (t.shape, FLOATS_IN) for t in wanted}
    described |= {name: (shape, (dtype.name,)) for name, (shape, dtype) in (integers or {}).items()}
    if integers is None and any(name.endswith(".qweight") for name in names):
        raise UserError(
            f"{files.folder}: the tensors are GPTQ's, but config.json has no {QUANTIZATION_CONFIG} that says how they "
            "are to be read"
        )
    missing = [name for name in described if name not in names]
    unexpected = sorted(name for name in names - described.keys() if not is_harmless_extra(name))
    misshapen, not_float, not_integer = [], [], []
    for name in (name for name in described if name in names):
        (shape, dtype), (right_shape, right_types) = files.describe(name), described[name]
        if shape != right_shape:
            misshapen.append(f"{name} is {list(shape)}, should be {list(right_shape)}")
        if dtype.name not in right_types and right_types == FLOATS_IN:
            not_float.append(f"{name} is {dtype.name}")
        elif dtype.name not in right_types:
            not_integer.append(f"{name} is {dtype.name}, should be {right_types[0]}")
    problems = [
        f"{len(found)} {what}: {some(found)}"
        for what, found in [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not floating-point", not_float),
            ("of another type", not_integer),
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
    quantize: str | None = None,
) -> QwenVL:
    """The model of a checkpoint folder.

    dtype: "float32", "bfloat16" or "float16"; default as stored. mesh, rules: where the parameters go; default one
    device. stacked: one scanned stack of layers (training) instead of a list of layers (inference). quantize: "int8",
    "int4" or "nf4" for the language model's linear maps; a folder that is quantised is loaded as it is without.
    Raises UserError if the folder is incomplete, damaged, or holds other tensors than its config.json calls for.
    """
    folder = Path(folder)
    check_dtype(dtype)
    config = read_config(folder)
    from qwenvl_jax.checkpoints import quantised  # it stands on this file

    if quantize is not None or quantised.stored_quantisation(folder) is not None:
        return quantised.load_model(
            folder, config, quantize=quantize, dtype=dtype, mesh=mesh, rules=rules, stacked=stacked
        )
    if (folder / ORBAX).is_dir():
        from qwenvl_jax.checkpoints import orbax  # slow to import, and most folders do not need it

        return orbax.load_model(folder, dtype=dtype, mesh=mesh, rules=rules, stacked=stacked)
    files = FolderTensors(folder)
    wanted = checkpoint_tensors(config)
    check_tensors(wanted, files)
    model = abstract_model(config, stacked=stacked)
    shardings = {} if mesh is None else param_paths(param_shardings(model, mesh, rules))
    paths = list(param_paths(model))
    leaves = load_parameters(paths, wanted, files, dtype=dtype, shardings=shardings)
    return jax.tree.unflatten(jax.tree.structure(model), [leaves[path] for path in paths])


def load_parameters(
    paths: Iterable[str],
    wanted: list[Tensor],
    files: FolderTensors,
    *,
    dtype: str | None,
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """Parameters by path, tensor by tensor. wanted: where each of them is found; shardings: by path, default none."""
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

    return {path: parameter(path) for path in paths}


def target_dtype(files: NamedTensors, parts: list[Tensor], dtype: str | None) -> np.dtype:
    """What the parameter is to be: `dtype`, else as stored, and the wider one where the layers of a stack differ."""
    if dtype is not None:
        return np.dtype(dtype)
    stored = {files.describe(part.name)[1] for part in parts}
    return np.dtype(jnp.result_type(*(np.float32 if found == np.float64 else found for found in stored)))


def read_as(files: NamedTensors, part: Tensor, dtype: np.dtype) -> np.ndarray:
    """One tensor in the parameter's dtype and shape, transposed as a view: the copy to the device is faster at it."""
    value = files.read(part.name)
    if value.dtype != dtype:
        with np.errstate(over="ignore"):
            converted = value.astype(dtype)
        if dtype == np.float16 and np.isinf(converted).any() and not np.isinf(value).any():
            raise UserError(f"{files.folder}: {part.name} has values too large for float16; use bfloat16")
        value = converted
    return part.to_parameter(value)


def place(value: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """The array on its devices, finished before the next tensor is read."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(value))
    return jax.block_until_ready(jax.make_array_from_callback(value.shape, sharding, value.__getitem__))


def _from_host(
    files: FolderTensors, parts: list[Tensor], dtype: str | None, sharding: NamedSharding | None, *, stacked: bool
) -> jax.Array:
    """A parameter from its one tensor, or a small stack from those of its layers."""
    target = target_dtype(files, parts, dtype)
    if not stacked:
        return place(read_as(files, parts[0], target), sharding)
    stack = np.empty((len(parts), *parts[0].parameter_shape), target)
    for layer, part in enumerate(parts):
        stack[layer] = read_as(files, part, target)
    return place(stack, sharding)


def _stack_on_device(
    files: FolderTensors, parts: list[Tensor], dtype: str | None, sharding: NamedSharding | None
) -> jax.Array:
    """A stack of layers, allocated once in its sharding and filled in place layer by layer."""
    target = target_dtype(files, parts, dtype)
    shape = (len(parts), *parts[0].parameter_shape)
    layer_sharding = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = empty_stack(shape, target, sharding)
    for layer, part in enumerate(parts):
        stack = fill(stack, place(read_as(files, part, target), layer_sharding), layer)
    return jax.block_until_ready(stack)


def empty_stack(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
    """Zeros in their sharding, to `fill`."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


@partial(jax.jit, donate_argnums=0)
def fill(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    """The stack, used up, with this value as one of its layers."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def save_model(
    model: QwenVL,
    folder: str | Path,
    *,
    tokenizer_file: str | Path | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint folder that `load_model` and the original implementation read, all or nothing.

    A model with int8 or int4 weights is written with these, nf4 is refused; see docs/quantisation.md.

    The weights go into safetensors files of at most `shard_bytes` (or one tensor) in the dtypes that they have. A copy
    of `tokenizer_file` and the two settings come along: `**small_files(folder)` gives those of another checkpoint. With
    several processes all must call this; the first one writes. Raises UserError if `folder` holds something already.
    """
    folder = Path(folder)
    check_free(folder)  # on every process, before some wait for others
    from qwenvl_jax.checkpoints import quantised  # it stands on this file

    config, described, values = quantised.contents(model) if quantised_linears(model) else _contents(model)
    if jax.process_index() != 0:
        for _ in values:  # takes part in gathering what is spread over processes
            pass
        return
    small = SmallFiles(
        tokenizer_file=None if tokenizer_file is None else Path(tokenizer_file),
        tokenizer_config=tokenizer_config,
        generation_config=generation_config,
    )
    write_folder(folder, (config, described, values), small, shard_bytes)


# What a folder will hold: its configuration, shape and dtype of every tensor by name, and the tensors in that order.
Contents = tuple[QwenVLConfig, dict[str, tuple[tuple[int, ...], np.dtype]], Iterator[np.ndarray]]


def write_folder(folder: Path, contents: Contents, small: SmallFiles, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder of these contents, one tensor in memory at a time, all or nothing."""
    config, described, values = contents
    with new_folder(folder) as new:
        write_small_files(new, config, next(iter(described.values()))[1].name, small)
        shards = _shards(described, shard_bytes)
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(new / name, shard, islice(values, len(shard)))
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(new / "model.safetensors.index.json", index)


def _contents(model: QwenVL) -> Contents:
    wanted = checkpoint_tensors(model.config)
    leaves = parameters_of(model, wanted)
    described = {t.name: (t.shape, np.dtype(leaves[t][0].dtype)) for t in wanted}
    values = (t.from_parameter(host_value(*leaves[t])) for t in wanted)
    return model.config, described, values


def parameters_of(model: QwenVL, wanted: list[Tensor]) -> dict[Tensor, tuple[jax.Array, int | None]]:
    """For each tensor the array that holds it and the index into the array's first axis, if that is a stack of layers.

    Raises UserError for a model with other parameters than the table's: it would not be saved whole.
    """
    leaves = {split_layer(path): leaf for path, leaf in param_paths(model).items()}
    used = set()
    result = {}
    for tensor in wanted:
        key = (tensor.path, tensor.layer)
        stacked = key not in leaves
        used.add((tensor.path, None) if stacked else key)
        result[tensor] = (leaves[(tensor.path, None)], tensor.layer) if stacked else (leaves[key], None)
    extra = some(path if layer is None else f"{path} of layer {layer}" for path, layer in leaves.keys() - used)
    if extra:
        raise UserError(f"the model has parameters that a Qwen-VL checkpoint has no place for: {extra}")
    return result


def host_value(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """An array, or one layer of a stack, on the host."""
    # Always through a temporary: an array keeps the host copy that is made of it.
    part = jnp.copy(leaf) if layer is None else take_layer(leaf, layer)
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


@jax.jit
def take_layer(stack: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of a stack, compiled once for all layers."""
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def _shards(described: dict[str, tuple[tuple[int, ...], np.dtype]], most: int) -> list[dict]:
    """The tensors in order, cut into runs of at most `most` bytes, at least one tensor each."""
    shards: list[dict] = []
    room = 0
    for name, (shape, dtype) in described.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append({})
            room = most
        shards[-1][name] = (shape, dtype)
        room -= size
    return shards
