"""Several adapter folders in PEFT's format loaded side by side, for a model whose requests choose one each.

One folder, active for all that the model does, is `peft.py`; the arithmetic is in `nn/adapter_bank.py`.
"""

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwenvl_jax.checkpoints.adapters import PREFIX, Site, adapted_sites, parent_of, sites
from qwenvl_jax.checkpoints.peft import SETTINGS, AdapterFile, open_adapter
from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.adapter_bank import BankedLinear, banked_linears
from qwenvl_jax.nn.lora import LoraRecipe, adapted_linears, copy
from qwenvl_jax.sharding import ShardingRules, param_shardings

ALONE = "load it alone (adapter), or merge it into a checkpoint of its own (qwenvl-convert --merge-adapter)"


def load_adapters(
    model: QwenVL,
    folders: Mapping[str, str | os.PathLike],
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> QwenVL:
    """The model with adapters to choose from, its base weights shared with `model`; see `with_chosen`.

    folders: adapters by the names that messages call them by; the first is number 1. Ranks, scales and targets may
    differ. mesh, rules: as in `load_adapter`. Raises UserError as that does, and for what belongs to the base weights
    and not to a row of a batch: DoRA, modules to save, biases.
    """
    if not folders:
        return model
    if adapted_linears(model) or banked_linears(model):
        raise UserError("the model has an adapter already, or several; give all of them together, as adapters")
    adapters = [_open(model, name, os.fspath(folder)) for name, folder in folders.items()]
    wanted = {site for adapter in adapters for site in adapted_sites(model.config, adapter.recipe)}
    result = copy(model)
    for site in (site for site in sites(model.config) if site in wanted):
        parent, in_list = parent_of(result, site)
        name = site.path.rpartition(".")[2]
        base = getattr(parent, name)
        if isinstance(base, BankedLinear):
            continue  # the first layer of a stack has brought all of them
        stack = None if in_list or site.layer is None else [s for s in sites(model.config) if s.path == site.path]
        a, b = _stacked(adapters, stack) if stack else _matrices(adapters, site)
        dtype = model.embedding.table[...].dtype  # that of activations, in which products run
        bank = (
            nnx.Param(a.astype(dtype), axes=(site.axes[0], None, None)),
            nnx.Param(b.astype(dtype), axes=(None, None, *site.axes[1:])),
        )
        a, b = jax.device_put(bank, None if mesh is None else param_shardings(bank, mesh, rules))
        setattr(parent, name, BankedLinear(base, a, b))
    return result


def _open(model: QwenVL, name: str, folder: str) -> AdapterFile:
    """A folder that fits the model and a bank."""
    try:
        adapter = open_adapter(model, folder)
    except UserError as error:
        raise UserError(f"adapter {name} ({folder}): {error}") from None
    problem = _problem(adapter.recipe)
    if problem:
        raise UserError(f"adapter {name} ({folder}): {SETTINGS}: {problem}, so it cannot be one of several; {ALONE}")
    return adapter


def _problem(recipe: LoraRecipe) -> str | None:
    """Why a request cannot choose this adapter while others use the same base."""
    if recipe.use_dora:
        return "use_dora scales the base model's weights"
    if recipe.modules_to_save:
        return f"modules_to_save ({', '.join(recipe.modules_to_save)}) replaces weights of the base model"
    if recipe.bias != "none":
        return f"bias = {recipe.bias!r} replaces biases of the base model"
    return None


def _stacked(adapters: Sequence[AdapterFile], stack: Sequence[Site]) -> tuple[np.ndarray, np.ndarray]:
    """`_matrices` of all layers of a stack."""
    a, b = zip(*(_matrices(adapters, site) for site in stack), strict=True)
    return np.stack(a), np.stack(b)


def _matrices(adapters: Sequence[AdapterFile], site: Site) -> tuple[np.ndarray, np.ndarray]:
    """float32 A [in, M, r] and B [M, r, *out] with r the largest rank; zeros where an adapter has none or less."""
    rank = max(adapter.recipe.rank for adapter in adapters)
    a = np.zeros((site.shape[0], len(adapters), rank), np.float32)
    b = np.zeros((len(adapters), rank, *site.shape[1:]), np.float32)
    for number, adapter in enumerate(adapters):
        found = {tensor.name.removeprefix(f"{PREFIX}{site.module}.lora_"): tensor for tensor in adapter.sources}
        if "A.weight" in found:
            own = slice(adapter.recipe.rank)
            a[:, number, own] = adapter.read(found["A.weight"])
            b[number, own] = adapter.recipe.scale * adapter.read(found["B.weight"]).astype(np.float32)
    return a, b
