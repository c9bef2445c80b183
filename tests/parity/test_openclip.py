"""The vision transformer of an OpenCLIP folder, through the assembled checkpoint, beside torch's own layers."""

import numpy as np
import torch
from weights import folder_tensors, language_folder, openclip_folder

from qwenvl_jax.checkpoints.assemble import assemble
from qwenvl_jax.checkpoints.huggingface import load_model

VISION = {"width": 48, "layers": 2, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 4, "image_size": 64}


class ResidualBlock(torch.nn.Module):
    """OpenCLIP's residual attention block: its attention is torch's, with queries, keys and values in thirds."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, hidden), "c_proj": torch.nn.Linear(hidden, width)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def openclip_patches(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Patch embeddings after all blocks [I, P, W], of a tower without a class token."""
    width, patch = VISION["width"], VISION["patch_size"]
    x = torch.nn.functional.conv2d(pixels, weights["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = x + weights["positional_embedding"][1:]
    x = torch.nn.functional.layer_norm(x, (width,), weights["ln_pre.weight"], weights["ln_pre.bias"], eps=1e-6)
    for layer in range(VISION["layers"]):
        block = ResidualBlock(width, width // VISION["head_width"], int(width * VISION["mlp_ratio"]))
        prefix = f"transformer.resblocks.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        block.load_state_dict(own)
        x = block(x)
    return x


def test_an_assembled_tower_sees_what_openclip_sees(fixtures, tmp_path):
    source = fixtures / "qwen-vl-chat-tiny-safetensors"
    language = language_folder(source, tmp_path / "language", np.dtype(np.float32))
    vision = openclip_folder(tmp_path / "vision", VISION)
    assemble(language, vision, tmp_path / "new")
    model = load_model(tmp_path / "new", stacked=True)
    pixels = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
    weights = {
        name.removeprefix("visual."): torch.from_numpy(value)
        for name, value in folder_tensors(vision, "open_clip_model.safetensors").items()
        if name.startswith("visual.")
    }
    with torch.no_grad():
        theirs = openclip_patches(weights, torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(np.asarray(model.visual.vit(pixels)), theirs, atol=5e-5)
