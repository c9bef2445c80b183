"""What tests of weights share: comparing them bit by bit, adapters that are as if trained, and folders to load."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.checkpoints.adapters import add_adapters, trainable_paths
from qwenvl_jax.checkpoints.huggingface import checkpoint_tensors
from qwenvl_jax.checkpoints.tensor_files import FolderTensors, SafetensorsFile, write_safetensors
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.sharding import param_paths


def bits(array) -> np.ndarray:
    array = np.ascontiguousarray(np.asarray(array))
    return array.view(f"u{array.itemsize}")


def assert_same(model, other):
    """The same parameters, types and bits."""
    left, right = param_paths(model), param_paths(other)
    assert list(left) == list(right)
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(bits(leaf), bits(right[path]), err_msg=path)


def trained(model, recipe, seed: int = 0):
    """New adapters with random values in all that training would change."""
    adapted = add_adapters(model, recipe, nnx.Rngs(0))
    random = np.random.default_rng(seed)
    moving, leaves = trainable_paths(adapted, recipe), param_paths(adapted)
    values = [
        leaf + jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype) if path in moving else leaf
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(adapted), values)


def folder_tensors(folder: Path, file: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint folder, or of one file in it."""
    files = FolderTensors(folder) if file is None else SafetensorsFile(folder / file)
    return {name: files.read(name) for name in files.names()}


def language_folder(source: Path, folder: Path, dtype: np.dtype | None = None) -> Path:
    """The language model of a Qwen-VL folder, as a base model of its own: no `visual`, raw text."""
    folder.mkdir(exist_ok=True)
    tensors = {name: value for name, value in folder_tensors(source).items() if ".visual." not in name}
    tensors = {name: value.astype(dtype or value.dtype) for name, value in tensors.items()}
    described = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    write_safetensors(folder / "model.safetensors", described, tensors.values())
    config = json.loads((source / "config.json").read_text())
    del config["visual"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qwen.tiktoken").write_bytes((source / "qwen.tiktoken").read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))
    return folder


def openclip_folder(folder: Path, vision: dict, claims: dict | None = None) -> Path:
    """A folder as OpenCLIP saves one: random weights of this `vision_cfg`, float32; `claims` change what it says."""
    folder.mkdir(exist_ok=True)
    width, patch, hidden = vision["width"], vision["patch_size"], int(vision["width"] * vision["mlp_ratio"])
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (257, width),
        "proj": (width, 32),
        "conv1.weight": (width, 3, patch, patch),
        **{f"{norm}.{kind}": (width,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
    }
    for layer in range(vision["layers"]):
        block = f"transformer.resblocks.{layer}"
        shapes |= {f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, size in (
            ("attn.out_proj", (width, width)),
            ("mlp.c_fc", (hidden, width)),
            ("mlp.c_proj", (width, hidden)),
        ):
            shapes |= {f"{block}.{name}.weight": size, f"{block}.{name}.bias": size[:1]}
    shapes = {f"visual.{name}": shape for name, shape in shapes.items()}
    shapes |= {"logit_scale": (), "transformer.resblocks.0.ln_1.weight": (32,), "text_projection": (32, 32)}
    rng = np.random.default_rng(0)
    tensors = {name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    described = {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    write_safetensors(folder / "open_clip_model.safetensors", described, map(np.asarray, tensors.values()))
    stated = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision | (claims or {}), "text_cfg": {"width": 32}}}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    return folder


def zeros_checkpoint(folder: Path) -> tuple[int, int]:
    """A checkpoint of zeros that takes no room on the disk; the bytes of the model and of the largest tensor."""
    raw = {
        "vocab_size": 12000,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 8192,
        "visual": {
            "heads": 2,
            "image_size": 56,
            "image_start_id": 100,
            "layers": 2,
            "mlp_ratio": 2.0,
            "n_queries": 16,
            "output_dim": 1024,
            "patch_size": 14,
            "width": 64,
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    header, position, largest = {}, 0, 0
    for tensor in checkpoint_tensors(QwenVLConfig.from_hf(raw)):
        size = 2 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [position, position + size]}
        position, largest = position + size, max(largest, size)
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + position)
    return position, largest
