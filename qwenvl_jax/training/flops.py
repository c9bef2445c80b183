"""Model FLOPs of a training step and the peak of a device, whose ratio over time is MFU.

Counted are the products with weights and the two products of attention, for real tokens and pictures, each once:
padding, what remat computes again, norms, softmax and the optimizer are none of the model's work (Chowdhery et al.
2022, PaLM, appendix B). For a model of N trained weights that is the well-known 6 N per token; frozen weights cost no
gradient of their own, so they cost 4 N where something under them learns, else 2 N.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.training.parts import part_name

# FLOP/s of one device in dense bfloat16 products, by the first words of its `device_kind`; the first that fits counts.
# From the vendors' data sheets (NVIDIA's of each board, without sparsity; Google Cloud's pages on TPU versions). JAX
# sees each of the two cores of a TPU v2 or v3 chip as a device.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its `jax.Device.device_kind`; None of one that is not known, a CPU say."""
    return next((peak for name, peak in PEAKS.items() if re.match(rf"{name}(?!\w)", device_kind)), None)


def peak_of_run(peak_tflops: float | None, mesh: Mesh) -> float | None:
    """FLOP/s of all devices of a mesh: as given of one of them, else as known, else None."""
    known = peak_flops(mesh.devices.flat[0].device_kind)
    one = known if peak_tflops is None else 1e12 * peak_tflops
    return None if one is None else one * mesh.size


@dataclasses.dataclass(frozen=True)
class StepCost:
    """FLOPs of the forward and the backward pass for one of each."""

    token: float
    pair: float  # of a token and an earlier one (or itself) that it attends to
    target: float  # logits are made for what is learnt alone
    picture: float

    def flops(self, tokens: float, pairs: float, targets: float, pictures: float) -> float:
        """Of a step with so many of each."""
        return self.token * tokens + self.pair * pairs + self.target * targets + self.picture * pictures


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the forward pass, for one token or picture."""

    weights: float  # FLOPs of its products with weights
    attention: float  # and of those without
    learning: float = 0.0  # FLOPs of the gradients of its weights
    moves: bool = False  # whether something in it is trained


def step_cost(config: QwenVLConfig, trained: Mapping[str, jax.Array]) -> StepCost:
    """The cost of training the parameters `trained` (arrays by path, "model.layers.qkv.kernel") of this model.

    The gradient of what goes into a part is counted for the whole part as soon as something in it, or under it, is
    trained; of LoRA alone that is a third of one layer too much.
    """
    vit, resampler, projection = vision_stages(config.visual, trained)
    tokens, pairs, head = language_stages(config, trained)
    table = any(path.startswith("model.embedding.") for path in trained)
    under_resampler = vit.moves
    under_projection = under_resampler or resampler.moves
    under_language = under_projection or projection.moves or table
    picture = _cost(vit, False) + _cost(resampler, under_resampler) + _cost(projection, under_projection)
    return StepCost(
        token=_cost(tokens, under_language),
        pair=_cost(dataclasses.replace(pairs, moves=tokens.moves), under_language),
        target=_cost(head, under_language or tokens.moves),
        picture=picture,
    )


def _cost(stage: Stage, below: bool) -> float:
    """Forward and backward: an attention product has two inputs with a gradient, a product with weights one."""
    backward = below or stage.moves
    return stage.weights * (1 + backward) + stage.attention * (1 + 2 * backward) + stage.learning


def vision_stages(vision: VisionConfig, trained: Mapping[str, jax.Array]) -> tuple[Stage, Stage, Stage]:
    """ViT, resampler, and the projection after it, for one picture."""
    patches, width, queries, dim = vision.grid**2, vision.width, vision.n_queries, vision.output_dim
    embedding = 3 * vision.patch_size**2 * width
    block = 4 * width**2 + 2 * width * vision.mlp_width
    vit = Stage(2 * patches * (embedding + vision.layers * block), vision.layers * 4 * patches**2 * width)
    narrow = width * dim if width != dim else 0
    # Query and output projections are of the queries, those of keys and values of the patches.
    read = 2 * (patches * (narrow + 2 * dim**2) + queries * 2 * dim**2)
    resampler = Stage(read, 4 * queries * patches * dim)
    projection = Stage(2 * queries * dim**2, 0)

    uses = {
        "vit.": float(patches),
        "resampler.kv.": patches,
        "resampler.attention.qkv.": (queries + 2 * patches) / 3,
        "resampler.attention.out.": queries,
        "projection.": queries,
    }
    return (
        _with_trained(vit, trained, "model.visual.vit.", uses),
        _with_trained(resampler, trained, "model.visual.resampler.", uses),
        _with_trained(projection, trained, ("model.visual.projection.", "model.visual.norm_post."), uses),
    )


def language_stages(config: QwenVLConfig, trained: Mapping[str, jax.Array]) -> tuple[Stage, Stage, Stage]:
    """The layers for one token, their attention for one pair of tokens, and the output head for one target."""
    dim, layers = config.hidden_size, config.num_hidden_layers
    layer = 4 * dim**2 + 3 * dim * config.mlp_width
    tokens = {path: value for path, value in trained.items() if part_name(path) == "language"}
    return (
        _with_trained(Stage(2 * layers * layer, 0), tokens, "model.", {}),
        Stage(0, layers * 4 * dim),
        _with_trained(Stage(2 * dim * config.vocab_size, 0), trained, "model.lm_head.", {}),
    )


def _with_trained(
    stage: Stage, trained: Mapping[str, jax.Array], prefix: str | tuple[str, ...], uses: Mapping[str, float]
) -> Stage:
    """The stage with the work for what is trained in it; adapters are weights that the forward pass has in addition.

    uses: how often a weight is used, by the start of its path after "model.visual."; once by default.
    """
    adapters = learning = 0.0
    for path, value in trained.items():
        if path.startswith(prefix):
            inner = path.removeprefix("model.visual.")
            product = 2 * value.size * next((count for start, count in uses.items() if inner.startswith(start)), 1)
            is_adapter = path.endswith((".a", ".b"))
            adapters += product * is_adapter
            learning += product * (is_adapter or path.endswith("kernel"))
    moves = any(path.startswith(prefix) for path in trained)
    return Stage(stage.weights + adapters, stage.attention, learning, moves)
