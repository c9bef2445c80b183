"""Qwen-VL put together from transformers' and torch's own layers, to compare this project's model with.

The original's code is not used, and neither is this project's arithmetic: only the weight table, which gives every
parameter the original's name. Importing this needs torch, which `make parity` installs in an environment of its own.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from qwenvl_jax.checkpoints.huggingface import abstract_model, checkpoint_tensors
from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.sharding import param_paths

Arrays = dict[str, np.ndarray]


def tiny_config(**changes) -> QwenVLConfig:
    """A small model. `visual_<field>` changes a field of the vision tower. NTK and logn stay off below 4096 tokens."""
    visual = {key.removeprefix("visual_"): changes.pop(key) for key in list(changes) if key.startswith("visual_")}
    language = {
        "vocab_size": 200,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "intermediate_size": 160,
        "seq_length": 4096,
    } | changes
    tower = {
        "image_size": 32,
        "patch_size": 8,
        "width": 48,
        "layers": 2,
        "heads": 3,
        "mlp_ratio": 2.0,
        "output_dim": language["hidden_size"],
        "n_queries": 4,
        "image_start_id": 190,
    } | visual
    return QwenVLConfig(**language, visual=VisionConfig(**tower))


# What differs: grids smaller, larger and as large as the position table, one and two resampler heads, the resampler's
# projection absent, a truncated MLP width, one layer.
CONFIGS = {
    "small_grid": tiny_config(),
    "large_grid": tiny_config(
        hidden_size=256, num_attention_heads=2, kv_channels=128, rotary_emb_base=500.0, visual_image_size=80,
        visual_patch_size=4, visual_mlp_ratio=1.99, visual_n_queries=9,
    ),
    "same_width": tiny_config(
        num_hidden_layers=1, vocab_size=333, layer_norm_epsilon=1e-5, visual_image_size=64, visual_patch_size=4,
        visual_width=128, visual_heads=8, visual_layers=1, visual_n_queries=1,
    ),
}  # fmt: skip


def random_model(config: QwenVLConfig, seed: int = 0) -> QwenVL:
    """A float32 model whose parameters are all random, norms and biases too, and of which none is negligible."""
    shapes = abstract_model(config, stacked=True)
    generator = np.random.default_rng(seed)

    def random(path: str, shape: tuple[int, ...]) -> jax.Array:
        value = generator.standard_normal(shape)
        if path.endswith("scale"):
            value = 1 + 0.2 * value
        elif path.endswith("kernel"):
            value *= shape[_input_axis(path)] ** -0.5
        elif path.endswith("bias"):
            value *= 0.2
        return jnp.asarray(value, jnp.float32)

    leaves = [random(path, leaf.shape) for path, leaf in param_paths(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _input_axis(path: str) -> int:
    """Which axis of a kernel is the input: fused projections have more than one output axis."""
    if "qkv" not in path:
        return -2
    return -4 if "blocks" in path else -3


def original_tensors(model: QwenVL) -> Arrays:
    """Parameters (or their gradients) of a model with stacked layers, by the original's names and in its shapes."""
    arrays = {path: np.asarray(leaf) for path, leaf in param_paths(model).items()}
    return {
        t.name: t.from_parameter(arrays[t.path] if t.layer is None else arrays[t.path][t.layer])
        for t in checkpoint_tensors(model.config)
    }


def torch_names(config: QwenVLConfig, original: Arrays) -> Arrays:
    """Tensors of the original as those of `TorchQwenVL`: renamed and re-ordered, so gradients can be given as well."""
    visual = config.visual
    found = {}
    for name, value in original.items():
        for torch_name, part in _parts(name, value, visual):
            found[torch_name] = np.ascontiguousarray(part)
    return found


def _parts(name: str, value: np.ndarray, visual: VisionConfig) -> Iterator[tuple[str, np.ndarray]]:
    kind = name.split(".")[-1]
    if name == "lm_head.weight":
        yield f"language.{name}", value
    elif name.startswith("transformer.visual.transformer.resblocks."):
        layer, rest = name.removeprefix("transformer.visual.transformer.resblocks.").split(".", 1)
        base = f"vision.blocks.{layer}"
        if rest.startswith("attn.in_proj"):  # [N, (q k v), H] to three separate maps
            heads = value.reshape(visual.heads, 3, visual.head_dim, *value.shape[1:])
            for which, letter in enumerate("qkv"):
                yield f"{base}.self_attn.{letter}_proj.{kind}", heads[:, which].reshape(-1, *value.shape[1:])
        else:
            own = rest.removesuffix(f".{kind}")
            names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
            names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            yield f"{base}.{names[own]}.{kind}", value
    elif name.startswith("transformer.visual."):
        yield "vision." + name.removeprefix("transformer.visual.").removeprefix("attn_pool."), value
    elif name.startswith("transformer.h."):
        layer, own = name.removeprefix("transformer.h.").removesuffix(f".{kind}").split(".", 1)
        base = f"language.model.layers.{layer}"
        if own == "attn.c_attn":
            for letter, third in zip("qkv", np.split(value, 3), strict=True):
                yield f"{base}.self_attn.{letter}_proj.{kind}", third
        else:
            names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj"}
            names |= {"mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj"}
            yield f"{base}.{names[own]}.{kind}", value
    else:
        yield (
            {"wte": "language.model.embed_tokens.weight", "ln_f": "language.model.norm.weight"}[name.split(".")[1]],
            value,
        )


def resized(table: torch.Tensor, grid: int) -> torch.Tensor:
    """A square position table [g*g, C] on another grid, [grid*grid, C], by torch's own interpolation."""
    side = int(table.shape[0] ** 0.5)
    if side == grid:
        return table
    picture = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    picture = functional.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return picture.permute(0, 2, 3, 1).reshape(grid * grid, -1)


class TorchVision(nn.Module):
    """The vision tower from a convolution, CLIP's encoder layers and torch's multi-head attention."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, dim, epsilon = config.width, config.output_dim, 1e-6
        clip = CLIPVisionConfig(
            hidden_size=width,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            hidden_act="gelu",
            layer_norm_eps=epsilon,
            attn_implementation="eager",
        )
        self.grid = config.grid
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(256, width))
        self.ln_pre = nn.LayerNorm(width, eps=epsilon)
        self.blocks = nn.ModuleList(CLIPEncoderLayer(clip) for _ in range(config.layers))
        self.query = nn.Parameter(torch.empty(config.n_queries, dim))
        self.pos_embed = nn.Parameter(torch.empty(config.n_queries, dim))
        self.kv_proj = nn.Identity() if width == dim else nn.Linear(width, dim, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(dim, eps=epsilon), nn.LayerNorm(dim, eps=epsilon)
        self.attn = nn.MultiheadAttention(dim, config.resampler_heads, batch_first=True)
        self.ln_post = nn.LayerNorm(dim, eps=epsilon)
        self.proj = nn.Parameter(torch.empty(dim, dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [I, 3, S, S] -> [I, Q, D]."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2) + resized(self.positional_embedding, self.grid)
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, None)
        kv = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        mixed, _ = self.attn(query, kv + resized(self.pos_embed, self.grid), kv, need_weights=False)
        return self.ln_post(mixed) @ self.proj


class TorchQwenVL(nn.Module):
    """The tower above and transformers' Qwen2, which is Qwen's decoder without dynamic NTK and logn."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.vision = TorchVision(config.visual)
        self.language = Qwen2ForCausalLM(language_config(config))

    def forward(
        self, ids: torch.Tensor, pixels: torch.Tensor, slots: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """ids, slots (row of the features or -1), valid [B, T]; pixels [I, 3, S, S] -> logits [B, T, V]."""
        features = self.vision(pixels).flatten(0, 1)
        embedded = self.language.model.embed_tokens(ids)
        embedded = torch.where(slots[..., None] >= 0, features[slots.clamp(min=0)], embedded)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.language(inputs_embeds=embedded, attention_mask=valid.long(), position_ids=positions).logits


def language_config(config: QwenVLConfig) -> Qwen2Config:
    assert config.rotary_pct == 1
    return Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_emb_base},
        max_position_embeddings=config.seq_length,
        tie_word_embeddings=False,
        pad_token_id=None,
        attn_implementation="eager",
    )


def torch_model(model: QwenVL) -> TorchQwenVL:
    """The same model in torch, with the same weights; every parameter of it is set."""
    reference = TorchQwenVL(model.config)
    state = {name: tensor(value) for name, value in torch_names(model.config, original_tensors(model)).items()}
    reference.load_state_dict(state, strict=True)
    return reference.eval()


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of three rows with two pictures: ids int32, slots int32, valid bool, labels int32 [B, T]; pixels."""

    ids: np.ndarray
    slots: np.ndarray
    valid: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def random_inputs(config: QwenVLConfig, seed: int = 1) -> Inputs:
    """Text, a row with both pictures and padding on the left, and a row padded on the right."""
    generator = np.random.default_rng(seed)
    queries = config.visual.n_queries
    length = 2 * queries + 12
    ids = generator.integers(0, config.visual.image_start_id, (3, length)).astype(np.int32)
    slots = np.full(ids.shape, -1, np.int32)
    slots[1, 5 : 5 + queries] = np.arange(queries, 2 * queries)  # not in the order in which they come
    slots[1, 7 + queries : 7 + 2 * queries] = np.arange(queries)
    valid = np.ones(ids.shape, bool)
    valid[1, :2] = False
    valid[2, -3:] = False
    # What padding would predict has no meaning: a query that may look nowhere gets some average, on either side.
    after_text = np.pad(valid[:, :-1], ((0, 0), (1, 0)))
    keep = valid & after_text & (slots < 0) & (generator.random(ids.shape) < 0.8)
    size = config.visual.image_size
    pixels = generator.standard_normal((2, 3, size, size)).astype(np.float32)
    return Inputs(ids, slots, valid, np.where(keep, ids, -100).astype(np.int32), pixels)


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
