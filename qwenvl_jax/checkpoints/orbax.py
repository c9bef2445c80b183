"""Qwen-VL checkpoints in Orbax's format, which every process of a cluster reads and writes its own part of.

Such a folder is a checkpoint folder like the others (config.json, vocabulary, settings) with the weights under
`orbax/`: the parameters by path, layers stacked. Not here: training state (step, optimizer, position in the data).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from qwenvl_jax.checkpoints.folder import SmallFiles, check_free, read_config, write_small_files
from qwenvl_jax.checkpoints.huggingface import ORBAX, abstract_model, check_dtype, take_layer
from qwenvl_jax.checkpoints.tensor_files import some
from qwenvl_jax.config import UserError
from qwenvl_jax.models.quantised import quantised_linears
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.sharding import ShardingRules, param_paths, param_shardings, split_layer


def save_model(
    model: QwenVL,
    folder: str | Path,
    *,
    tokenizer_file: str | Path | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder with the weights in Orbax's format; arguments as in `huggingface.save_model`.

    config.json comes last: a folder that a killed process has left without it is not a checkpoint. With several
    processes all must call this, with `folder` on a file system that they share. Raises UserError if it holds
    something already.
    """
    folder = Path(folder).expanduser().absolute()
    if quantised_linears(model):
        raise UserError("quantised weights are written as safetensors, not in Orbax's format")
    check_free(folder)
    multihost_utils.sync_global_devices("nothing is written before everyone has looked")
    parameters = _stacked(model)
    small = SmallFiles(
        tokenizer_file=None if tokenizer_file is None else Path(tokenizer_file),
        tokenizer_config=tokenizer_config,
        generation_config=generation_config,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ocp.save(folder / ORBAX, parameters)
        if jax.process_index() == 0:
            write_small_files(folder, model.config, parameters["embedding.table"].dtype.name, small)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _stacked(model: QwenVL) -> dict[str, jax.Array]:
    """The parameters by path, layers stacked whichever form the model has."""
    parts: dict[str, list[jax.Array]] = {}
    layers = set()
    for path, leaf in param_paths(model).items():
        base, layer = split_layer(path)
        parts.setdefault(base, []).append(leaf)
        if layer is not None:
            layers.add(base)
    return {path: jnp.stack(found) if path in layers else found[0] for path, found in parts.items()}


def load_model(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    stacked: bool = False,
) -> QwenVL:
    """The model of a folder that `save_model` wrote; arguments and errors as in `huggingface.load_model`.

    Each process reads only what its devices hold. For a list of layers, one stack at a time is in memory besides the
    model.
    """
    folder = Path(folder).expanduser().absolute()
    check_dtype(dtype)
    config = read_config(folder)
    on_disk, model = (abstract_model(config, stacked=form) for form in (True, stacked))
    device = jnp.zeros(()).sharding  # the default one, which a `jax.default_device` around this call may set

    def placed(abstract: QwenVL) -> dict[str, Any]:
        if mesh is None:
            return dict.fromkeys(param_paths(abstract), device)
        return param_paths(param_shardings(abstract, mesh, rules))

    stored = _stored(folder, param_paths(on_disk))
    sources, targets = placed(on_disk), placed(model)
    wanted = {
        path: jax.ShapeDtypeStruct(entry.shape, dtype or entry.dtype, sharding=sources[path])
        for path, entry in stored.items()
    }
    leaves: dict[str, jax.Array] = {}
    split: dict[str, list[tuple[str, int]]] = {}  # stack: the leaves to cut it into
    for path in targets:
        base, layer = split_layer(path)
        if layer is not None:
            split.setdefault(base, []).append((path, layer))
    leaves |= _load(folder, {path: leaf for path, leaf in wanted.items() if path not in split}, wanted)
    for base, pieces in split.items():
        stack = _load(folder, {base: wanted[base]}, wanted)[base]
        leaves |= {path: jax.device_put(take_layer(stack, layer), targets[path]) for path, layer in pieces}
    return jax.tree.unflatten(jax.tree.structure(model), [leaves[path] for path in targets])


def _stored(folder: Path, parameters: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Shape and dtype of what is on disk, by path. Raises UserError if that is not what the model consists of."""
    try:
        stored = ocp.metadata(folder / ORBAX).metadata
        if not isinstance(stored, dict):  # Orbax's own answer to some kinds of damage
            raise ValueError("no list of parameters")
    except Exception as error:  # whatever a damaged folder provokes in Orbax and TensorStore
        raise _damaged(folder, error) from None
    problems = {
        "missing": sorted(parameters.keys() - stored.keys()),
        "unexpected": sorted(map(str, stored.keys() - parameters.keys())),
        "of another shape": [
            f"{path} is {list(stored[path].shape)}, should be {list(leaf.shape)}"
            for path, leaf in parameters.items()
            if path in stored and tuple(stored[path].shape) != leaf.shape
        ],
    }
    found = [f"{len(paths)} {what}: {some(paths)}" for what, paths in problems.items() if paths]
    if found:
        raise UserError(f"{folder / ORBAX}: the weights do not fit config.json. Parameters " + "; ".join(found))
    return stored


def _load(folder: Path, some_of: dict[str, jax.ShapeDtypeStruct], all_of: dict[str, Any]) -> dict[str, jax.Array]:
    """Reads some of the parameters."""
    try:
        loaded = ocp.load(folder / ORBAX, dict.fromkeys(all_of, ...) | some_of)
    except Exception as error:
        raise _damaged(folder, error) from None
    for path, leaf in some_of.items():
        if leaf.dtype == jnp.float16 and not bool(jnp.isfinite(loaded[path]).all()):
            raise UserError(f"{folder}: {path} has values too large for float16; use bfloat16")
    return {path: loaded[path] for path in some_of}


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder / ORBAX}: damaged or incomplete ({str(error).strip()[:300]}); copy it again")
