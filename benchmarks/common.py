"""What the comparisons with transformers on torch share: a model of the same shape, and what machine this is."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

from qwenvl_jax.config import QwenVLConfig


def their_settings(config: QwenVLConfig, merge: int = 2):
    """A Qwen2_5_VLConfig whose language model has the shape of ours and whose vision tower its width and depth.

    merge: patches per side that make one picture token.
    """
    from transformers import Qwen2_5_VLConfig

    visual = config.visual
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": _sections(config.kv_channels),
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": visual.layers,
        "hidden_size": visual.width,
        "num_heads": visual.heads,
        "intermediate_size": visual.mlp_width,
        "patch_size": visual.patch_size,
        "spatial_merge_size": merge,
        "window_size": 8 * visual.patch_size,
        "fullatt_block_indexes": [visual.layers - 1],
        "out_hidden_size": config.hidden_size,
    }
    start = visual.image_start_id
    ids_of_pictures = {"vision_start_token_id": start, "vision_end_token_id": start + 1, "image_token_id": start + 2}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, video_token_id=0, **ids_of_pictures)


def _sections(head_dim: int) -> list[int]:
    """Frequencies for time, rows and columns, in about the shares of the released model: 16, 24 and 24 of 64."""
    space = head_dim * 3 // 16
    return [head_dim // 2 - 2 * space, space, space]


def machine(packages: Sequence[str]) -> dict:
    """Hardware, system and versions of packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "jax_device": jax.devices()[0].device_kind,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def described(machine: dict) -> str:
    """What `machine` found, in one line."""
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}, {versions}"
    )
