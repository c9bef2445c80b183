"""Adapter folders in PEFT's format: adapter_config.json with adapter_model.safetensors (or `.bin`, read without torch).

What we write PEFT reads, but for a key of our own in the settings, the fingerprint of the base model, which it ignores.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.checkpoints.adapters import (
    ATTENTION,
    PREFIX,
    Parameters,
    adapted_sites,
    adapter_tensors,
    add_adapters,
    matches,
    saved_tensors,
    sites,
)
from qwenvl_jax.checkpoints.fingerprint import base_fingerprint, same_base
from qwenvl_jax.checkpoints.folder import GENERATION_CONFIG, check_free, new_folder, write_json
from qwenvl_jax.checkpoints.huggingface import FLOATS, host_value
from qwenvl_jax.checkpoints.qwen_vl import Tensor
from qwenvl_jax.checkpoints.tensor_files import SafetensorsFile, open_tensors, read_json, some, write_safetensors
from qwenvl_jax.checkpoints.torch_pickle import TorchFile
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.lora import LoraRecipe
from qwenvl_jax.sharding import ShardingRules, param_paths, param_shardings

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OWN_KEY = "qwenvl_jax"

# Settings that change what an adapter computes and that are not supported, with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, [], ""),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
}
# Initialisations that change the base weights as well; PEFT's own conversion makes a plain adapter of them.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class AdapterFile(NamedTuple):
    """The tensors of an adapter folder, and what each is called in its file."""

    recipe: LoraRecipe
    file: SafetensorsFile | TorchFile
    sources: dict[Tensor, str]

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor as its parameter has it, of one layer."""
        return tensor.to_parameter(self.file.read(self.sources[tensor]))


def open_adapter(model: QwenVL, folder: str | Path) -> AdapterFile:
    """A folder, checked against its base model, which has no adapters yet. Raises UserError as `load_adapter` does."""
    folder = Path(folder).expanduser()
    settings = _read_settings(folder)
    recipe = recipe_of(settings, model.config, folder / SETTINGS)
    file = _open_weights(folder)
    sources = _check_tensors(file, model.config, recipe)
    _check_base(model, recipe, settings, folder)
    return AdapterFile(recipe, file, sources)


def load_adapter(
    model: QwenVL, folder: str | Path, *, mesh: Mesh | None = None, rules: ShardingRules | None = None
) -> QwenVL:
    """The model with the adapter of a folder active: unmerged, its base weights shared with `model`.

    mesh, rules: where the adapter's arrays go, as in `huggingface.load_model`. Raises UserError for a folder that is
    incomplete or damaged, holds other tensors than its settings say, or is of another base model: by the fingerprint
    where the folder has one (what `save_adapter` wrote), and by the shapes in any case.
    """
    opened = open_adapter(model, folder)
    adapted = add_adapters(model, opened.recipe, rngs=None)
    shardings = {} if mesh is None else param_paths(param_shardings(adapted, mesh, rules))
    parameters = Parameters(adapted)
    parts: dict[str, list[Tensor]] = {}
    for tensor in opened.sources:
        parts.setdefault(parameters.get(tensor)[0], []).append(tensor)
    leaves = dict(parameters.leaves)
    for path, tensors in parts.items():
        old = leaves[path]
        values = [opened.read(tensor) for tensor in tensors]
        value = (np.stack(values) if old.ndim > values[0].ndim else values[0]).astype(old.dtype)
        leaves[path] = jax.device_put(value, shardings.get(path, old.sharding))
    return jax.tree.unflatten(jax.tree.structure(adapted), [leaves[path] for path in parameters.leaves])


def save_adapter(
    model: QwenVL,
    folder: str | Path,
    recipe: LoraRecipe,
    *,
    base: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that `load_adapter` and PEFT read, all or nothing.

    model: one with the adapters of `recipe` on it. base: name or folder of the base model, for whoever reads the file;
    the model itself is known by its fingerprint. generation_config: where the adapter wants others than its base's, as
    one does that has taught a base model to chat. With several processes all must call this; the first one writes.
    Raises UserError if `folder` holds something already.
    """
    folder = Path(folder).expanduser()
    check_free(folder)  # on every process, before some wait for others
    wanted, parameters = adapter_tensors(model.config, recipe), Parameters(model)
    places = {tensor: parameters.get(tensor) for tensor in wanted}
    described = {t.name: (t.shape, np.dtype(parameters.leaves[path].dtype)) for t, (path, _) in places.items()}
    values = (t.from_parameter(host_value(parameters.leaves[path], layer)) for t, (path, layer) in places.items())
    fingerprint = base_fingerprint(model, recipe)
    if jax.process_index() != 0:
        for _ in values:  # takes part in gathering what is spread over processes
            pass
        return
    with new_folder(folder) as new:
        write_safetensors(new / WEIGHTS[0], described, values)
        settings = _settings(recipe, model.config) | {"base_model_name_or_path": None if base is None else str(base)}
        if generation_config is not None:
            write_json(new / GENERATION_CONFIG, generation_config)
        write_json(new / SETTINGS, dict(sorted(settings.items())) | {OWN_KEY: {"base_fingerprint": fingerprint}})


def _settings(recipe: LoraRecipe, config: QwenVLConfig) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig.

    It knows no "*" in names, and takes "out_proj" for the output of torch's attention module as well, which is not
    used when it is wrapped; such targets are written out.
    """
    plain = not any(set("*?[") & set(target) for target in recipe.targets)
    plain = plain and not matches(f"{ATTENTION}.out_proj", recipe.targets)
    names = recipe.targets if plain else {site.module for site in adapted_sites(config, recipe)}
    saved = sorted(recipe.modules_to_save or ())
    if any(set("*?[") & set(name) for name in saved):
        saved = sorted({tensor.name.rpartition(".")[0] for tensor in saved_tensors(config, recipe)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "target_modules": sorted(names),
        "modules_to_save": saved or None,
        "bias": recipe.bias,
        "use_rslora": recipe.use_rslora,
        "use_dora": recipe.use_dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
    }


def _read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: not an adapter folder, it has no {SETTINGS}")
    return read_json(folder / SETTINGS)


def recipe_of(settings: Mapping[str, Any], config: QwenVLConfig, file: Path) -> LoraRecipe:
    """The recipe that an adapter_config.json describes. Raises UserError naming the field that is not supported."""
    if str(settings.get("peft_type")).upper() != "LORA":
        raise UserError(f"{file}: peft_type is {settings.get('peft_type')!r}; only LORA adapters are supported")
    for field, harmless in UNSUPPORTED.items():
        if settings.get(field) not in harmless:
            raise UserError(f"{file}: {field} = {settings[field]!r} is not supported; it must be {harmless[-1]!r}")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights = {start!r} changes the base model too; save the adapter as a plain LoRA in "
            "PEFT (path_initial_model_for_weight_conversion)"
        )
    targets, saved = settings.get("target_modules"), settings.get("modules_to_save")
    if isinstance(targets, str):
        names = [site.module for site in sites(config)]
        every = [name for name in names if name != "lm_head"]
        found = every if targets == "all-linear" else [name for name in names if re.fullmatch(targets, name)]
        targets = tuple(dict.fromkeys(found))
    try:
        return LoraRecipe(
            rank=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0.0),
            targets=tuple(targets or ()),
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            bias=settings.get("bias") or "none",
            modules_to_save=tuple(saved or ()),
        )
    except KeyError as error:
        raise UserError(f"{file}: the field {error.args[0]} is missing") from None
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"{file}: {error}") from None


def _open_weights(folder: Path) -> SafetensorsFile | TorchFile:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return open_tensors(folder / name)
    raise UserError(f"{folder}: the adapter's weights are missing; looked for {' and '.join(WEIGHTS)}")


def _check_tensors(file: SafetensorsFile | TorchFile, config: QwenVLConfig, recipe: LoraRecipe) -> dict[Tensor, str]:
    """What each tensor of the recipe is called in the file. Raises UserError listing all that is wrong."""
    names = set(file.names())
    sources: dict[Tensor, str] = {}
    missing, wrong = [], []
    for tensor in adapter_tensors(config, recipe):
        # Older versions of PEFT leave out the last step of an adapted map's bias; newer ones have it where an adapter
        # does nothing, too (see below).
        plain = tensor.name.replace(".base_layer.bias", ".bias")
        wrapped = re.sub(r"\.bias$", ".base_layer.bias", plain)
        known = [name for name in (tensor.name, plain, wrapped) if name in names]
        if not known:
            missing.append(tensor.name)
            continue
        sources[tensor] = known[0]
        shape, dtype = file.describe(known[0])
        if shape != tensor.shape:
            wrong.append(f"{known[0]} is {list(shape)}, should be {list(tensor.shape)}")
        elif dtype.name not in (*FLOATS, "float64"):
            wrong.append(f"{known[0]} is {dtype.name}, should be a floating-point tensor")
    unexpected = sorted(name for name in names - set(sources.values()) if not _does_nothing(file, name))
    problems = [f"{len(wrong)} of another kind: {some(wrong, 3)}"] if wrong else []
    if missing:
        own = {PREFIX + tensor.name for tensor in saved_tensors(config, recipe)}
        hint = " (modules_to_save names them, but they were not saved: train or export again)"
        problems.append(
            f"{len(missing)} missing: {some(missing)}"
            + (hint if recipe.modules_to_save and set(missing) <= own else "")
        )
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {some(unexpected)}")
    if problems:
        raise UserError(f"{file.path}: does not fit {SETTINGS} and the base model. Tensors: " + "; ".join(problems))
    return sources


def _does_nothing(file: SafetensorsFile | TorchFile, name: str) -> bool:
    """Whether this belongs to an adapter that the target `out_proj` puts where torch does not use it.

    PEFT never trains one on the output of torch's attention module, so its B is still zero; a B that is not would
    count in a merged model and not in an unmerged one.
    """
    adapter = f"{PREFIX}{ATTENTION}.out_proj.lora_"
    if not name.startswith(adapter) or f"{adapter}B.weight" not in file.names():
        return False
    return not np.any(file.read(f"{adapter}B.weight").astype(np.float32))


def _check_base(model: QwenVL, recipe: LoraRecipe, settings: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if the folder has a fingerprint and it is of another model."""
    own = settings.get(OWN_KEY)
    known = own.get("base_fingerprint") if isinstance(own, Mapping) else None
    if isinstance(known, Mapping) and not same_base(dict(known), base_fingerprint(model, recipe)):
        base = settings.get("base_model_name_or_path")
        name = f" ({base})" if base else ""
        raise UserError(
            f"{folder}: this adapter was trained on another base model{name}; the weights of this one differ. Give the "
            "checkpoint that it was trained on"
        )
