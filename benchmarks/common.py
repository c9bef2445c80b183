"""What benchmarks share: transformers' model of the same shape, what machine this is, and what it can do at most."""

import dataclasses
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.nn.linear import full_precision
from qwenvl_jax.training.flops import peak_flops

# Bytes/s of a device's memory, by the first words of its `device_kind`; the first that fits counts. From the vendors'
# data sheets, as are the FLOP/s of `training/flops.py`.
BANDWIDTHS = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-PCIE-40GB": 1.555e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA L4": 0.3e12,
    "TPU v6 lite": 1.64e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5p": 2.765e12,
}


def their_settings(config: QwenVLConfig):
    """A Qwen2_5_VLConfig whose language model has the shape of ours and whose vision tower its width and depth.

    A picture of theirs has as many patches and tokens as one of ours.
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
        "spatial_merge_size": visual.grid // visual.query_grid,
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


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a device can do at most. source: where the numbers come from, for people."""

    flops: float  # per second, of products
    bandwidth: float  # bytes per second, from memory
    source: str

    def limit(self, flops: float, size: float) -> float:
        """The seconds that so many FLOPs and bytes take at least, where each goes on while the other does."""
        return max(flops / self.flops, size / self.bandwidth)

    def bound(self, flops: float, size: float) -> str:
        """Which of the two that is."""
        return "FLOPs" if flops / self.flops > size / self.bandwidth else "bytes"

    def described(self) -> str:
        return f"{self.flops / 1e9:,.0f} GFLOP/s and {self.bandwidth / 1e9:,.1f} GB/s ({self.source})"


def peaks(dtype: str, size: int) -> Peaks:
    """Those of the first device for products of `dtype` and reads of `size` bytes: published, else measured here.

    A processor's caches make small reads faster, so reads are measured at that size.
    """
    kind = jax.devices()[0].device_kind
    flops = peak_flops(kind) if dtype == "bfloat16" else None
    bandwidth = next((value for name, value in BANDWIDTHS.items() if re.match(rf"{name}(?!\w)", kind)), None)
    names = {True: "measured", False: "of the data sheet"}
    source = f"FLOP/s {names[flops is None]}, bytes/s {names[bandwidth is None]}"
    return Peaks(flops or product_speed(dtype), bandwidth or read_speed(size), source)


def product_speed(dtype: str) -> float:
    """FLOP/s of one large product of matrices on the first device, in the precision that the model has."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=full_precision(a.dtype)))
    multiply(a).block_until_ready()
    return 2 * size**3 / min(timed(lambda: multiply(a).block_until_ready()) for _ in range(10))


def read_speed(size: int) -> float:
    """Bytes per second at which an array of `size` bytes is read again and again; on accelerators one of 1 GiB."""
    if jax.default_backend() == "cpu":
        return max(_read_by_threads(size, threads) for threads in {1, os.cpu_count() or 1})
    array = jnp.ones(2**28, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    return array.nbytes / min(timed(lambda: total(array).block_until_ready()) for _ in range(10))


def _read_by_threads(size: int, threads: int) -> float:
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    rounds = max(1, 400_000_000 // size)

    def read(part: np.ndarray) -> None:
        for _ in range(rounds):
            np.dot(part, part)

    with ThreadPoolExecutor(threads) as pool:
        best = min(timed(lambda: list(pool.map(read, parts))) for _ in range(3))
    return size * rounds / best


def timed(work: Callable[..., object], *arguments: object) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start
