"""Adapters: PEFT reads what we write and we read what PEFT writes, active and merged."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity.reference import original_tensors, random_model, tensor, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qwenvl_jax.checkpoints.adapters import add_adapters, trainable_paths
from qwenvl_jax.checkpoints.peft import load_adapter, save_adapter
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.lora import LoraRecipe, merge_adapters
from qwenvl_jax.sharding import param_paths

VISION = ("in_proj", "out_proj", "c_fc", "kv_proj")
RECIPES = {
    "default": LoraRecipe(rank=2),
    "vision": LoraRecipe(rank=2, targets=("c_attn", "mlp.c_proj", "lm_head", *VISION), use_rslora=True),
    "bias all": LoraRecipe(rank=2, targets=("c_attn", "w1", *VISION), bias="all", modules_to_save=("wte", "ln_post")),
    "bias lora_only": LoraRecipe(rank=2, targets=("c_attn", "w1", *VISION), bias="lora_only"),
    "dora": LoraRecipe(rank=2, targets=("c_attn", "w2", "in_proj", "kv_proj"), use_dora=True),
    "base model": LoraRecipe(rank=2, modules_to_save=("wte", "lm_head", "attn_pool")),
    "stars": LoraRecipe(rank=2, targets=("h.*.mlp.w1", "resblocks.*.attn.*"), modules_to_save=("ln_*",)),
}


class Original(nn.Module):
    """Modules under the original's names, with the weights of a model; they are called one by one."""

    def __init__(self, model: QwenVL):
        super().__init__()
        values = {name: tensor(value) for name, value in original_tensors(model).items()}
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in values):
            if parent.endswith("attn_pool.attn.out_proj"):
                continue  # of torch's attention module
            own = {name.rpartition(".")[2]: v for name, v in values.items() if name.rpartition(".")[0] == parent}
            *above, last = parent.split(".")
            module = self._leaf(parent, own, model.config.visual.resampler_heads)
            if module is None:
                self._bare(parent, own)
            else:
                self._inside(above).add_module(last, module)
        self.load_state_dict(values, strict=True)

    @staticmethod
    def _leaf(name: str, own: dict[str, torch.Tensor], heads: int) -> nn.Module | None:
        if "in_proj_weight" in own:
            return nn.MultiheadAttention(own["in_proj_weight"].shape[1], heads, batch_first=True)
        if "weight" not in own:
            return None
        weight, bias = own["weight"], "bias" in own
        if name.endswith("wte"):
            return nn.Embedding(*weight.shape)
        if weight.ndim == 4:
            return nn.Conv2d(3, weight.shape[0], weight.shape[-1], stride=weight.shape[-1], bias=False)
        return nn.LayerNorm(len(weight), bias=bias) if weight.ndim == 1 else nn.Linear(*weight.shape[::-1], bias=bias)

    def _inside(self, path: list[str]) -> nn.Module:
        here: nn.Module = self
        for name in path:
            if name not in here._modules:
                here.add_module(name, nn.Module())
            here = here._modules[name]
        return here

    def _bare(self, parent: str, own: dict[str, torch.Tensor]) -> None:
        for name, value in own.items():
            self._inside(parent.split(".")).register_parameter(name, nn.Parameter(torch.empty_like(value)))

    def prepare_inputs_for_generation(self):  # PEFT asks a causal language model for it
        raise NotImplementedError


@pytest.fixture(scope="module")
def model() -> QwenVL:
    return random_model(tiny_config())


def assert_same_weights(theirs: nn.Module, ours: QwenVL) -> None:
    expected = theirs.state_dict()
    found = original_tensors(ours)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name].numpy(), atol=2e-6, err_msg=name)


def changed(model: QwenVL, recipe: LoraRecipe) -> QwenVL:
    """With random values in all that training would change."""
    adapted, random = add_adapters(model, recipe, nnx.Rngs(0)), np.random.default_rng(0)
    moving = trainable_paths(adapted, recipe)
    values = [
        leaf + jnp.asarray(0.2 * random.standard_normal(leaf.shape), leaf.dtype) if path in moving else leaf
        for path, leaf in param_paths(adapted).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(adapted), values)


def peft_model(model: QwenVL, folder: Path) -> PeftModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(Original(model), str(folder))
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "missing" in text.lower() and "keys" in text.lower()], said
    return wrapped


@pytest.mark.parametrize("kind", RECIPES)
def test_peft_reads_what_we_write(model, kind, tmp_path):
    recipe = RECIPES[kind]
    adapted = changed(model, recipe)
    save_adapter(adapted, tmp_path / "adapter", recipe, base="the-base")
    wrapped = peft_model(model, tmp_path / "adapter")
    random = np.random.default_rng(1)
    x = random.standard_normal((2, 5, 128)).astype(np.float32)
    with torch.no_grad():
        c_attn = _named(wrapped, "h.1.attn.c_attn")
        layer = jax.tree.map(lambda leaf: leaf[1], adapted.layers).qkv
        ours = np.asarray(layer(jnp.asarray(x))).reshape(2, 5, -1)
        np.testing.assert_allclose(ours, c_attn(tensor(x)).numpy(), atol=2e-5)
    assert_same_weights(wrapped.merge_and_unload(), merge_adapters(adapted))


def _named(wrapped: PeftModel, name: str) -> nn.Module:
    return wrapped.get_submodule(f"base_model.model.transformer.{name}")


THEIRS = {
    "list": {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]},
    "pattern": {"target_modules": r".*\.h\.\d+\.mlp\.w[12]|.*kv_proj", "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "modules_to_save": ["wte"]},
    "original's vision targets": {"target_modules": ["in_proj", "out_proj", "c_fc"], "bias": "all"},
    "whole resampler": {"target_modules": ["c_attn"], "modules_to_save": ["attn_pool"], "bias": "lora_only"},
    "dora": {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_we_read_what_peft_writes(model, kind, safe, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **THEIRS[kind])
    wrapped = get_peft_model(Original(model), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        unused = "attn_pool.attn.out_proj.lora_B" in name  # training never reaches it
        if parameter.requires_grad and not unused:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(tmp_path), safe_serialization=safe)
    adapted = load_adapter(model, tmp_path)
    assert_same_weights(wrapped.merge_and_unload(), merge_adapters(adapted))
