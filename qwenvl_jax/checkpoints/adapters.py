"""Adapters on a Qwen-VL by the names that its checkpoint gives to modules: where they go, and what training changes.

The arithmetic is in `nn/lora.py`, the files are in `peft.py`.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from qwenvl_jax.checkpoints.huggingface import abstract_model, checkpoint_tensors
from qwenvl_jax.checkpoints.qwen_vl import Tensor
from qwenvl_jax.checkpoints.tensor_files import some
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.lora import AdaptedLinear, LoraRecipe, adapted_linears, copy
from qwenvl_jax.sharding import param_paths, path_name, split_layer

# The resampler's attention is one module of torch, which does not call its projections; PEFT adapts it by a way of its
# own, which (in 0.21) counts the output projection's change twice. So adapters do not go there.
ATTENTION = "transformer.visual.attn_pool.attn"

PREFIX = "base_model.model."  # of every name in PEFT's files


@dataclass(frozen=True)
class Site:
    """A linear map of the model that can have an adapter."""

    module: str  # its name in the checkpoint: "transformer.h.0.attn.c_attn"
    path: str  # in the model: "layers.qkv"
    layer: int | None
    shape: tuple[int, ...]  # of one layer's weights, [in, *out]
    axes: tuple[str | None, ...]  # their logical axes


@functools.lru_cache(maxsize=8)
def all_tensors(config: QwenVLConfig) -> tuple[Tensor, ...]:
    """The tensors of the checkpoint."""
    return tuple(checkpoint_tensors(config))


@functools.lru_cache(maxsize=8)
def sites(config: QwenVLConfig) -> tuple[Site, ...]:
    """All places for adapters, in the order of the checkpoint."""
    variables = jax.tree_util.tree_flatten_with_path(
        abstract_model(config, stacked=True), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )[0]
    axes = {path_name(path): variable.get_metadata().get("axes", ()) for path, variable in variables}
    found = []
    for tensor in all_tensors(config):
        # A convolution and a bare matrix (`proj`) are no linear modules.
        if tensor.layout != "linear" or tensor.name.endswith("conv1.weight") or tensor.name.startswith(ATTENTION):
            continue
        module = tensor.name.removesuffix(".weight")
        path = tensor.path.removesuffix(".kernel")
        shape = tensor.parameter_shape
        found.append(Site(module, path, tensor.layer, shape, axes[tensor.path]))
    return tuple(found)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name, or what follows a dot in it, is one of the patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def adapted_sites(config: QwenVLConfig, recipe: LoraRecipe) -> list[Site]:
    """The places that a recipe's targets name. Raises UserError for a target that names none."""
    every = sites(config)
    for target in recipe.targets:
        if not any(matches(site.module, [target]) for site in every):
            names = sorted({re.sub(r"\.\d+\.", ".*.", site.module) for site in every})
            near = difflib.get_close_matches(target, [name.rpartition(".")[2] for name in names])
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"lora: targets: no linear map of this model is called {target}; {hint}")
    saved = _modules_to_save(config, recipe)  # as in PEFT: what is trained whole gets no adapter
    return [site for site in every if matches(site.module, recipe.targets) and f"{site.module}.weight" not in saved]


def _modules_to_save(config: QwenVLConfig, recipe: LoraRecipe) -> set[str]:
    """The tensors of `modules_to_save`. Raises UserError for a module that there is not."""
    result: set[str] = set()
    for wanted in recipe.modules_to_save or ():
        inside = {t.name for t in all_tensors(config) if any(matches(m, [wanted]) for m in _modules_above(t.name))}
        if not inside:
            raise UserError(f"lora: modules_to_save: the checkpoint has no module {wanted}; for example wte or lm_head")
        result |= inside
    return result


def _modules_above(name: str) -> list[str]:
    """["transformer", "transformer.wte"] for "transformer.wte.weight"."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def saved_tensors(config: QwenVLConfig, recipe: LoraRecipe) -> list[Tensor]:
    """The model's own tensors that are trained and saved beside the adapters: modules to save, and biases."""
    names = _modules_to_save(config, recipe)
    # To PEFT, a name that ends otherwise ("in_proj_bias") is no bias.
    biases = {tensor.name for tensor in all_tensors(config) if tensor.name.endswith(".bias")}
    if recipe.bias == "all":
        names |= biases
    elif recipe.bias == "lora_only":
        names |= biases & {f"{site.module}.bias" for site in adapted_sites(config, recipe)}
    return [tensor for tensor in all_tensors(config) if tensor.name in names]


def adapter_tensors(config: QwenVLConfig, recipe: LoraRecipe) -> list[Tensor]:
    """What a saved adapter consists of: tensors under PEFT's names, and the parameters that they fill."""
    chosen = adapted_sites(config, recipe)
    result = []
    for site in chosen:
        out, rank = site.shape[1:], recipe.rank
        start, path, size = f"{PREFIX}{site.module}", site.path, math.prod(out)
        a = Tensor(
            f"{start}.lora_A.weight", (rank, site.shape[0]), f"{path}.a", site.layer, "linear", (site.shape[0], rank)
        )
        b = Tensor(f"{start}.lora_B.weight", (size, rank), f"{path}.b", site.layer, "linear", (rank, *out))
        result += [a, b]
        if recipe.use_dora:
            name, path = f"{start}.lora_magnitude_vector", f"{path}.magnitude"
            result.append(Tensor(name, (size,), path, site.layer, "same", out))
    # PEFT wraps an adapted map; the one that was there, with its bias, is `base_layer` inside.
    moved = {f"{site.module}.bias": f"{site.module}.base_layer.bias" for site in chosen}
    result += [
        replace(tensor, name=PREFIX + moved.get(tensor.name, tensor.name)) for tensor in saved_tensors(config, recipe)
    ]
    return result


def add_adapters(model: QwenVL, recipe: LoraRecipe, rngs: nnx.Rngs | None) -> QwenVL:
    """The model with new adapters where the recipe says; its own arrays are shared, not copied.

    What the model computes is unchanged until they are trained. Works with stacked layers and with a list of them.
    rngs: None leaves all of the adapters zero, for values loaded afterwards. Raises UserError for targets that this
    model does not have, or of which a stack has only some layers.
    """
    wanted = adapted_sites(model.config, recipe)
    if adapted_linears(model):
        raise UserError("the model has adapters already; merge them first")
    model = copy(model)
    for site in wanted:
        parent, in_list = parent_of(model, site)
        name = site.path.rpartition(".")[2]
        if isinstance(getattr(parent, name), AdaptedLinear):
            continue  # the first layer of a stack has brought all of them
        stack = None if in_list or site.layer is None else _stack_size(model.config, wanted, site.path)
        base = getattr(parent, name)
        setattr(parent, name, AdaptedLinear(base, site.shape, axes=site.axes, recipe=recipe, stack=stack, rngs=rngs))
    return model


def parent_of(model: QwenVL, site: Site) -> tuple[Any, bool]:
    """The module that holds the linear map, and whether its layers are a list."""
    here: Any = model
    in_list = False
    for name in site.path.split(".")[:-1]:
        here = getattr(here, name)
        if isinstance(here, nnx.List):
            assert site.layer is not None
            here, in_list = here[site.layer], True
    return here, in_list


def _stack_size(config: QwenVLConfig, wanted: list[Site], path: str) -> int:
    """The number of layers of a stack, all of which must be wanted."""
    reached = [str(site.layer) for site in wanted if site.path == path]
    size = sum(site.path == path for site in sites(config))
    if len(reached) < size:
        raise UserError(
            f"lora: targets reach layers {some(reached)} of {path}, which is one stack of {size} layers; name all of "
            "its layers, or take the model with a list of layers"
        )
    return size


class Parameters:
    """The arrays of a model, found by the path that they have without adapters and with stacked layers."""

    def __init__(self, model: QwenVL):
        self.leaves = param_paths(model)
        inside = tuple(".".join(map(str, path)) + ".base." for path in adapted_linears(model))
        self._paths: dict[tuple[str, int | None], str] = {}
        for path in self.leaves:
            plain = path.replace(".base.", ".") if path.startswith(inside) else path
            self._paths[split_layer(plain)] = path

    def find(self, tensor: Tensor) -> tuple[str, int | None] | None:
        """The path of a tensor's array, and the layer to take from it if it is a stack; None if there is none."""
        path = self._paths.get((tensor.path, tensor.layer))
        if path is not None:
            return path, None
        path = self._paths.get((tensor.path, None))
        return None if path is None else (path, tensor.layer)

    def get(self, tensor: Tensor) -> tuple[str, int | None]:
        """As `find`; raises UserError where the model has no such array."""
        found = self.find(tensor)
        if found is None:
            raise UserError(
                f"lora: the model has no array for {tensor.name}; a quantised one cannot be trained or saved"
            )
        return found


def trainable_paths(model: QwenVL, recipe: LoraRecipe) -> set[str]:
    """The paths (as in `sharding.param_paths`) of the arrays that training changes; all others are frozen.

    They are the adapters' and, of the model's own, those that the recipe trains: `modules_to_save` and biases.
    """
    parameters = Parameters(model)
    return {parameters.get(tensor)[0] for tensor in adapter_tensors(model.config, recipe)}


def learning_rate_ratios(model: QwenVL, recipe: LoraRecipe) -> dict[str, float]:
    """For each trainable path the factor of its learning rate: LoRA+ lets B learn faster than all else."""
    parameters = Parameters(model)
    return {
        parameters.get(tensor)[0]: recipe.loraplus_ratio if tensor.name.endswith(".lora_B.weight") else 1.0
        for tensor in adapter_tensors(model.config, recipe)
    }
