"""The weight table of Qwen-VL: which tensor of a checkpoint is which parameter of the model, both ways.

Bijective: every parameter has one tensor and every tensor one parameter, but for the harmless extras listed below.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from qwenvl_jax.config import QwenVLConfig

# Buffers that foreign exports of the same model contain and that hold nothing.
HARMLESS_EXTRAS = (r".*\.attn\.masked_bias", r".*\.attn\.bias", r".*rotary_emb\.inv_freq")

# (tensor name, parameter path, layout). "{layer}" runs over stacked layers. Layouts: "same" keeps the order of the
# values, "linear" transposes [out, in] to [in, *out] (a convolution kernel counts as [out, in], last axes flattened).
LANGUAGE = (
    ("transformer.wte.weight", "embedding.table", "same"),
    ("transformer.h.{layer}.ln_1.weight", "layers.norm_attention.scale", "same"),
    ("transformer.h.{layer}.attn.c_attn.weight", "layers.qkv.kernel", "linear"),
    ("transformer.h.{layer}.attn.c_attn.bias", "layers.qkv.bias", "same"),
    ("transformer.h.{layer}.attn.c_proj.weight", "layers.out.kernel", "linear"),
    ("transformer.h.{layer}.ln_2.weight", "layers.norm_mlp.scale", "same"),
    ("transformer.h.{layer}.mlp.w1.weight", "layers.up.kernel", "linear"),
    ("transformer.h.{layer}.mlp.w2.weight", "layers.gate.kernel", "linear"),
    ("transformer.h.{layer}.mlp.c_proj.weight", "layers.down.kernel", "linear"),
    ("transformer.ln_f.weight", "norm_final.scale", "same"),
    ("lm_head.weight", "lm_head.kernel", "linear"),
)
VISUAL = (
    ("conv1.weight", "vit.patch_embedding.kernel", "linear"),
    ("positional_embedding", "vit.positions", "same"),
    ("ln_pre.weight", "vit.norm_pre.scale", "same"),
    ("ln_pre.bias", "vit.norm_pre.bias", "same"),
    ("transformer.resblocks.{layer}.ln_1.weight", "vit.blocks.norm_attention.scale", "same"),
    ("transformer.resblocks.{layer}.ln_1.bias", "vit.blocks.norm_attention.bias", "same"),
    ("transformer.resblocks.{layer}.attn.in_proj.weight", "vit.blocks.qkv.kernel", "linear"),
    ("transformer.resblocks.{layer}.attn.in_proj.bias", "vit.blocks.qkv.bias", "same"),
    ("transformer.resblocks.{layer}.attn.out_proj.weight", "vit.blocks.out.kernel", "linear"),
    ("transformer.resblocks.{layer}.attn.out_proj.bias", "vit.blocks.out.bias", "same"),
    ("transformer.resblocks.{layer}.ln_2.weight", "vit.blocks.norm_mlp.scale", "same"),
    ("transformer.resblocks.{layer}.ln_2.bias", "vit.blocks.norm_mlp.bias", "same"),
    ("transformer.resblocks.{layer}.mlp.c_fc.weight", "vit.blocks.up.kernel", "linear"),
    ("transformer.resblocks.{layer}.mlp.c_fc.bias", "vit.blocks.up.bias", "same"),
    ("transformer.resblocks.{layer}.mlp.c_proj.weight", "vit.blocks.down.kernel", "linear"),
    ("transformer.resblocks.{layer}.mlp.c_proj.bias", "vit.blocks.down.bias", "same"),
    ("attn_pool.pos_embed", "resampler.positions", "same"),
    ("attn_pool.query", "resampler.query", "same"),
    ("attn_pool.kv_proj.weight", "resampler.kv.kernel", "linear"),
    ("attn_pool.attn.in_proj_weight", "resampler.attention.qkv.kernel", "linear"),
    ("attn_pool.attn.in_proj_bias", "resampler.attention.qkv.bias", "same"),
    ("attn_pool.attn.out_proj.weight", "resampler.attention.out.kernel", "linear"),
    ("attn_pool.attn.out_proj.bias", "resampler.attention.out.bias", "same"),
    ("attn_pool.ln_q.weight", "resampler.norm_query.scale", "same"),
    ("attn_pool.ln_q.bias", "resampler.norm_query.bias", "same"),
    ("attn_pool.ln_kv.weight", "resampler.norm_kv.scale", "same"),
    ("attn_pool.ln_kv.bias", "resampler.norm_kv.bias", "same"),
    ("ln_post.weight", "norm_post.scale", "same"),
    ("ln_post.bias", "norm_post.bias", "same"),
    ("proj", "projection.kernel", "same"),  # applied as x @ proj, so it is not transposed
)


@dataclass(frozen=True)
class Tensor:
    """One checkpoint tensor: its name and shape there, the parameter it fills, and which layer of a stack it is."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    layout: str
    parameter_shape: tuple[int, ...]  # of one layer

    @property
    def module(self) -> str:
        """The name of what the tensor belongs to: "transformer.h.0.attn.c_attn"."""
        return self.name.rpartition(".")[0]

    def to_parameter(self, value: np.ndarray) -> np.ndarray:
        """The tensor's values as the parameter (one layer of it) holds them; a view where possible."""
        if self.layout == "linear":
            value = value.reshape(value.shape[0], -1).T
        return value.reshape(self.parameter_shape)

    def from_parameter(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_parameter`."""
        if self.layout == "linear":
            value = value.reshape(value.shape[0], -1).T
        return value.reshape(self.shape)


def tensors(config: QwenVLConfig, parameter_shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """All tensors of a checkpoint of this configuration, in the order of the table.

    parameter_shapes: shape by path of the model with stacked layers, as {"layers.qkv.kernel": (32, 4096, 3, 4096)}.
    """
    patch = config.visual.patch_size
    rows = [*LANGUAGE, *((f"transformer.visual.{name}", f"visual.{path}", layout) for name, path, layout in VISUAL)]
    result = []
    for name, path, layout in rows:
        if path not in parameter_shapes:  # resampler.kv where both widths agree
            continue
        shape = parameter_shapes[path]
        layers = range(shape[0]) if "{layer}" in name else [None]
        one = shape[1:] if "{layer}" in name else shape
        if name.endswith("conv1.weight"):
            hf_shape = (one[1], 3, patch, patch)
        elif layout == "linear":
            hf_shape = (math.prod(one[1:]), one[0])
        elif path.endswith("qkv.bias"):
            hf_shape = (math.prod(one),)
        else:
            hf_shape = one
        result += [Tensor(name.format(layer=i), hf_shape, path, i, layout, one) for i in layers]
    return result


def is_harmless_extra(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in HARMLESS_EXTRAS)
