"""Checkpoint folders and quantised weights: loading what is quantised, quantising while loading, and saving.

`huggingface.py` calls this where weights are or shall be quantised. How the tensors of one linear map are laid out is
in `gptq.py` and `int8.py`, which have the same functions; nf4 has no layout in files.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.checkpoints import gptq, int8
from qwenvl_jax.checkpoints.folder import QUANTIZATION_CONFIG, QUANTIZE_CONFIG
from qwenvl_jax.checkpoints.huggingface import (
    ORBAX,
    Contents,
    abstract_model,
    check_tensors,
    checkpoint_tensors,
    empty_stack,
    fill,
    host_value,
    load_parameters,
    parameters_of,
    place,
    read_as,
    target_dtype,
)
from qwenvl_jax.checkpoints.qwen_vl import Tensor
from qwenvl_jax.checkpoints.tensor_files import FolderTensors, read_json
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.models.quantised import LINEARS, Quantisation, form_of, quantise, quantised_linears
from qwenvl_jax.models.qwen_vl import Block, QwenVL, unstack
from qwenvl_jax.nn.quantised import Int4Linear, linear_of
from qwenvl_jax.sharding import ShardingRules, param_paths, param_shardings, split_layer

LAYOUTS = {"int4": gptq, "int8": int8}
KERNELS = {f"layers.{name}.kernel" for name in LINEARS}

Parts = dict[str, jax.Array]  # of one quantised map, by name


def stored_quantisation(folder: Path) -> Quantisation | None:
    """How a folder's weights are quantised, None if they are not. Raises UserError for ways that are not supported."""
    where = f"{folder / 'config.json'}, {QUANTIZATION_CONFIG}"
    block = read_json(folder / "config.json").get(QUANTIZATION_CONFIG)
    if block is None and (folder / QUANTIZE_CONFIG).is_file():
        where = str(folder / QUANTIZE_CONFIG)
        block = read_json(folder / QUANTIZE_CONFIG)
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: should be an object {{...}}")
    method = block.get("quant_method", gptq.METHOD)
    for layout in LAYOUTS.values():
        if method == layout.METHOD:
            return layout.read_block(block, where)
    methods = ", ".join(layout.METHOD for layout in LAYOUTS.values())
    raise UserError(f"{where}: quant_method is {method!r}; there are {methods}")


def load_model(
    folder: Path,
    config: QwenVLConfig,
    *,
    quantize: str | None,
    dtype: str | None,
    mesh: Mesh | None,
    rules: ShardingRules | None,
    stacked: bool,
) -> QwenVL:
    """The model of a folder with its linear maps quantised as they are stored, else as `quantize` says.

    Arguments as in `huggingface.load_model`. One linear map at a time is in memory unquantised.
    """
    stored = stored_quantisation(folder)
    quantisation = stored or Quantisation(quantize or "")
    if quantize is not None and quantize != quantisation.form:
        raise UserError(f"{folder}: is quantised already, as {quantisation.form}; it cannot become {quantize}")
    if (folder / ORBAX).is_dir():
        raise UserError(
            f"{folder}: weights in Orbax's format are not quantised while loading; convert the folder to safetensors"
        )
    files = FolderTensors(folder)
    every = checkpoint_tensors(config)
    weights = [tensor for tensor in every if tensor.path in KERNELS]
    others = [tensor for tensor in every if tensor.path not in KERNELS]
    if stored is None:
        check_tensors(every, files)
    else:
        biases = _extra_biases(weights, files)
        _check_quantised(weights, [*others, *biases], files, stored)
        others += _not_zero(biases, files)
    biased = {tensor.path.split(".")[1] for tensor in others} & set(LINEARS)
    model = _abstract(config, quantisation, biased, stacked=stacked)
    shardings = {} if mesh is None else param_paths(param_shardings(model, mesh, rules))

    reader = _Reader(files, config, quantisation, is_stored=stored is not None, mesh=mesh, rules=rules)
    leaves: dict[str, jax.Array] = {}
    for path in sorted(KERNELS):
        layers = [weight for weight in weights if weight.path == path]
        leaves |= _stacked(reader, layers, shardings) if stacked else _listed(reader, layers)
    paths = list(param_paths(model))
    rest = [path for path in paths if path not in leaves]
    leaves |= load_parameters(rest, others, files, dtype=dtype, shardings=shardings)
    return jax.tree.unflatten(jax.tree.structure(model), [leaves[path] for path in paths])


def _check_quantised(weights: list[Tensor], others: list[Tensor], files: FolderTensors, stored: Quantisation) -> None:
    layout = LAYOUTS[stored.form]
    scales = [
        dataclasses.replace(w, name=layout.scale_name(w.module), shape=layout.scale_shape(w, stored)) for w in weights
    ]
    integers = {name: entry for weight in weights for name, entry in layout.integers(weight, stored).items()}
    check_tensors([*others, *scales], files, integers)


def _extra_biases(weights: list[Tensor], files: FolderTensors) -> list[Tensor]:
    """The biases that a quantised folder has where the float model has none: for all layers or for no layer of a kind.

    AutoGPTQ writes them for every map that it quantises.
    """
    names = set(files.names())
    kinds = {weight.path for weight in weights if f"{weight.module}.bias" in names} - {"layers.qkv.kernel"}
    return [_bias_of(weight) for weight in weights if weight.path in kinds]


def _bias_of(weight: Tensor) -> Tensor:
    return Tensor(
        name=f"{weight.module}.bias",
        shape=weight.shape[:1],
        path=weight.path.replace(".kernel", ".bias"),
        layer=weight.layer,
        layout="same",
        parameter_shape=weight.parameter_shape[1:],
    )


def _not_zero(biases: list[Tensor], files: FolderTensors) -> list[Tensor]:
    """Without those of the kinds that are zero in all layers."""
    kinds = {bias.path for bias in biases if files.read(bias.name).any()}
    return [bias for bias in biases if bias.path in kinds]


def _abstract(config: QwenVLConfig, quantisation: Quantisation, biased: set[str], *, stacked: bool) -> QwenVL:
    """The quantised model with shapes in place of arrays."""

    def build(model: QwenVL) -> QwenVL:
        model = nnx.merge(*nnx.split(model))
        for name in biased:
            linear = getattr(model.layers, name)
            if linear.bias is None:
                kernel = linear.kernel
                shape = (kernel.shape[0], *kernel.shape[2:])
                axes = kernel.get_metadata()["axes"][1:]
                linear.bias = nnx.data(nnx.Param(jnp.zeros(shape), axes=axes))
        model = quantise(model, quantisation)
        return model if stacked else unstack(model)

    model = jax.eval_shape(build, abstract_model(config, stacked=True))
    model.config = config  # a cached trace returns the config that it saw, which may differ in `extra`
    return model


class _Reader:
    """Reads one linear map of a folder as the parts of a quantised one, on the devices that hold them."""

    def __init__(
        self,
        files: FolderTensors,
        config: QwenVLConfig,
        quantisation: Quantisation,
        *,
        is_stored: bool,
        mesh: Mesh | None,
        rules: ShardingRules | None,
    ):
        self.files, self.quantisation, self.is_stored = files, quantisation, is_stored
        self.shardings: dict[str, NamedSharding] = {}  # of one layer's kernel and parts, as if it were the first
        if mesh is not None:
            for model in (abstract_model(config, stacked=False), _abstract(config, quantisation, set(), stacked=False)):
                self.shardings |= param_paths(param_shardings(model, mesh, rules))

    def __call__(self, weight: Tensor) -> Parts:
        if self.is_stored:
            host = LAYOUTS[self.quantisation.form].read(self.files, weight, self.quantisation)
            return {name: place(value, self._sharding(weight, name)) for name, value in host.items()}
        kernel = read_as(self.files, weight, target_dtype(self.files, [weight], None))
        device = place(kernel, self._sharding(weight, "kernel"))
        prefix = f"{_of_layer(weight, 0)}."
        shardings = tuple(
            (path.removeprefix(prefix), sharding)
            for path, sharding in self.shardings.items()
            if path.startswith(prefix)
        )
        parts, finite = _quantiser(self.quantisation, len(weight.parameter_shape), shardings)(device)
        if not finite:
            raise UserError(
                f"{self.files.folder}: {weight.name} has values that {self.quantisation.form} cannot hold "
                "(not a number, or too large)"
            )
        return parts

    def _sharding(self, weight: Tensor, part: str) -> NamedSharding | None:
        return self.shardings.get(f"{_of_layer(weight, 0)}.{part}")


def _of_layer(weight: Tensor, layer: int | None) -> str:
    """The path of a linear map: "layers.3.qkv", or "layers.qkv" for layers in a stack."""
    name = weight.path.split(".")[1]
    return f"layers.{name}" if layer is None else f"layers.{layer}.{name}"


@cache
def _quantiser(quantisation: Quantisation, dimensions: int, shardings: tuple[tuple[str, NamedSharding], ...]):
    """kernel [in, *out] of so many dimensions -> its parts, and whether all of them are finite; compiled."""

    def run(kernel: jax.Array) -> tuple[Parts, jax.Array]:
        parts = param_paths(quantisation(linear_of(kernel, axes=(None,) * dimensions)))
        # The kernel, too: on CPUs a maximum may pass over what is not a number.
        floats = [kernel] + [part for part in parts.values() if jnp.issubdtype(part.dtype, jnp.floating)]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in floats]))
        of = dict(shardings)
        parts = {n: jax.lax.with_sharding_constraint(p, of[n]) if n in of else p for n, p in parts.items()}
        return parts, finite

    return jax.jit(run)


def _listed(reader: _Reader, weights: list[Tensor]) -> dict[str, jax.Array]:
    """The parts of a kind of map, each layer for itself."""
    return {
        f"{_of_layer(weight, weight.layer)}.{name}": part for weight in weights for name, part in reader(weight).items()
    }


def _stacked(reader: _Reader, weights: list[Tensor], shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """The parts of a kind of map, its layers in one array that is filled in place."""
    stacks: dict[str, jax.Array] = {}
    for layer, weight in enumerate(weights):
        for name, part in reader(weight).items():
            path = f"{_of_layer(weight, None)}.{name}"
            if layer == 0:
                stacks[path] = empty_stack((len(weights), *part.shape), np.dtype(part.dtype), shardings.get(path))
            stacks[path] = fill(stacks[path], part, layer)
    return jax.block_until_ready(stacks)


def contents(model: QwenVL) -> Contents:
    """What a folder with this quantised model holds. Raises UserError for a model that no folder can hold."""
    quantisation = _quantisation_of(model)
    layout = LAYOUTS[quantisation.form]
    paths = {split_layer(path)[0]: leaf for path, leaf in param_paths(model).items()}
    every = checkpoint_tensors(model.config)
    weights = [tensor for tensor in every if tensor.path in KERNELS]
    others = [tensor for tensor in every if tensor.path not in KERNELS]
    others += [
        _bias_of(weight) for weight in weights if _bias_of(weight).path in paths.keys() - {t.path for t in others}
    ]
    parts = {weight: _parts_of(weight, paths) for weight in weights}
    leaves = parameters_of(model, [*others, *(part for found in parts.values() for part in found)])

    described = {tensor.name: (tensor.shape, np.dtype(leaves[tensor][0].dtype)) for tensor in others}
    float_type = next(iter(described.values()))[1]
    names: dict[Tensor, list[str]] = {}
    for weight in weights:
        scale = (layout.scale_shape(weight, quantisation), np.dtype(paths[f"{_of_layer(weight, None)}.scale"].dtype))
        own = layout.integers(weight, quantisation) | {layout.scale_name(weight.module): scale}
        if layout is gptq and f"{weight.module}.bias" not in described:  # older readers want one for every map
            own[f"{weight.module}.bias"] = (weight.shape[:1], float_type)
        described |= own
        names[weight] = list(own)

    def values() -> Iterator[np.ndarray]:
        for tensor in others:
            yield tensor.from_parameter(host_value(*leaves[tensor]))
        for weight in weights:
            host = {part.name: host_value(*leaves[part]) for part in parts[weight]}
            tensors = layout.tensors(host, weight, quantisation)
            for name in names[weight]:
                yield tensors[name] if name in tensors else np.zeros(*described[name])

    extra = dict(model.config.extra) | {QUANTIZATION_CONFIG: layout.write_block(quantisation)}
    return dataclasses.replace(model.config, extra=extra), described, values()


def _parts_of(weight: Tensor, paths: Mapping[str, jax.Array]) -> list[Tensor]:
    """The parts of a quantised map as if they were tensors of a checkpoint, to find them in the model."""
    prefix = f"{_of_layer(weight, None)}."
    found = [path for path in paths if path.startswith(prefix) and not path.endswith(".bias")]
    return [Tensor(path.removeprefix(prefix), (), path, weight.layer, "same", ()) for path in found]


def _quantisation_of(model: QwenVL) -> Quantisation:
    """How all linear maps of a model are quantised. Raises UserError where that cannot be written down."""
    linears = [linear for _, linear in quantised_linears(model)]
    forms = sorted({form_of(linear) for linear in linears})
    expected = len(LINEARS) * (1 if isinstance(model.layers, Block) else len(model.layers))
    if len(forms) > 1 or len(linears) != expected:
        raise UserError(
            f"the model has {len(linears)} linear maps of {expected} quantised, as {' and '.join(forms)}; a folder "
            "holds all in one form. Save dequantise(model)"
        )
    if forms[0] not in LAYOUTS:
        raise UserError(
            f"{forms[0]} weights are not written to folders: keep the folder that they come from and load it with "
            f"quantize={forms[0]!r}, or save dequantise(model)"
        )
    maps = [linear for linear in linears if isinstance(linear, Int4Linear)]
    if not maps:
        return Quantisation(forms[0])
    sizes = {linear.group_size for linear in maps}
    if len(sizes) > 1 and any(linear.group_size != linear.in_dim for linear in maps):
        raise UserError(f"the linear maps have groups of {sorted(sizes)} rows; a folder has one size for all")
    size = sizes.pop() if len(sizes) == 1 else -1
    return Quantisation("int4", size, ordered=any(linear.order is not None for linear in maps))
