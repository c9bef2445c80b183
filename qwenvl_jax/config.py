"""Model configuration: what a checkpoint's `config.json` says, as frozen dataclasses, both ways.

Field names are those of the Hugging Face file so that a reader finds them there. Keys of the file that the model does
not read are carried along in `extra` and written back unchanged. What a run does (learning rate, batch) is not here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave. The message names the place and what to do; scripts print it and exit with 2."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The `visual` block: OpenCLIP ViT and resampler (Qwen-VL paper, section 2.1; values there in the comments)."""

    image_size: int  # 448, pixels per side of the square network input
    patch_size: int  # 14
    width: int  # 1664
    layers: int  # 48
    heads: int  # 16
    mlp_ratio: float  # 4.9231
    output_dim: int  # 4096, equals the language model's hidden_size
    n_queries: int = 256  # a square number: the query grid of the resampler
    image_start_id: int = 151857  # `<img>`; `</img>` and `<imgpad>` follow

    # The checkpoint's ViT position table is a 16x16 grid whatever the picture size, and is interpolated to `grid`.
    position_grid = 16
    # Every LayerNorm of the tower; no key of config.json sets it.
    layer_norm_epsilon = 1e-6

    def __post_init__(self):
        problems = []
        if self.image_size % self.patch_size:
            problems.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            problems.append(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.output_dim % 128:
            problems.append(f"output_dim {self.output_dim} is not a multiple of 128 (one resampler head per 128)")
        if math.isqrt(self.n_queries) ** 2 != self.n_queries:
            problems.append(f"n_queries {self.n_queries} is not a square number")
        if problems:
            raise UserError("config.json, visual: " + "; ".join(problems))

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def query_grid(self) -> int:
        """Resampler queries per side."""
        return math.isqrt(self.n_queries)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)  # truncated, as in the original

    @property
    def resampler_heads(self) -> int:
        return self.output_dim // 128


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A Qwen-VL model (values of the released 9.6B model in the comments)."""

    vocab_size: int  # 151936
    hidden_size: int  # 4096
    num_hidden_layers: int  # 32
    num_attention_heads: int  # 32, plain multi-head attention
    intermediate_size: int  # 22016; each branch of the gated MLP is half as wide
    visual: VisionConfig
    kv_channels: int = 128  # head dim
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    rotary_pct: float = 1.0
    seq_length: int = 2048  # training length; longer prompts switch on dynamic NTK and logn attention
    max_position_embeddings: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        problems = []
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            problems.append(
                f"kv_channels {self.kv_channels} x num_attention_heads {self.num_attention_heads} "
                f"is not hidden_size {self.hidden_size}"
            )
        if self.visual.output_dim != self.hidden_size:
            problems.append(f"visual.output_dim {self.visual.output_dim} is not hidden_size {self.hidden_size}")
        if self.visual.image_start_id + 2 >= self.vocab_size:
            problems.append(
                f"visual.image_start_id {self.visual.image_start_id} leaves no room in vocab_size {self.vocab_size}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.kv_channels:
            problems.append(
                f"rotary_pct {self.rotary_pct} gives {self.rotary_dim} rotated dimensions; needs an even number"
            )
        if problems:
            raise UserError("config.json: " + "; ".join(problems))

    @property
    def mlp_width(self) -> int:
        """Width F of each branch of the gated MLP."""
        return self.intermediate_size // 2

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.kv_channels * self.rotary_pct)

    def with_image_size(self, image_size: int) -> "QwenVLConfig":
        """The same model for square pictures of another size in pixels, which must be a multiple of the patch size."""
        return dataclasses.replace(self, visual=dataclasses.replace(self.visual, image_size=image_size))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "QwenVLConfig":
        """Reads the dictionary of a `config.json`. Raises UserError naming what is missing or contradicts itself."""
        if raw.get("model_type", "qwen") != "qwen" or not isinstance(raw.get("visual"), Mapping):
            raise UserError(
                f"config.json: model_type {raw.get('model_type')!r} "
                + ("without" if not raw.get("visual") else "with")
                + " a `visual` block is not a Qwen-VL model; this project loads Qwen-VL and Qwen-VL-Chat"
            )
        unsupported = {"tie_word_embeddings": True, "no_bias": False, "scale_attn_weights": False}
        for key, value in unsupported.items():
            if raw.get(key) is value:
                raise UserError(f"config.json: {key} = {value} does not occur in Qwen-VL and is not supported")
        fields = {f.name for f in dataclasses.fields(cls)} - {"extra", "visual"}
        visual_fields = {f.name for f in dataclasses.fields(VisionConfig)}
        visual = {k: v for k, v in raw["visual"].items() if k in visual_fields}
        extra = {k: v for k, v in raw.items() if k not in fields and k != "visual"}
        extra["visual"] = {k: v for k, v in raw["visual"].items() if k not in visual_fields}
        try:
            return cls(visual=VisionConfig(**visual), extra=extra, **{k: v for k, v in raw.items() if k in fields})
        except TypeError as error:  # a required field is absent; dataclasses name it
            raise UserError(f"config.json: {str(error).split('__init__() ')[-1]}") from None

    def to_hf(self) -> dict[str, Any]:
        """The dictionary to write as `config.json`, which the original implementation reads."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("extra", "visual")}
        extra = dict(self.extra)
        visual = dataclasses.asdict(self.visual) | dict(extra.pop("visual", {}))
        defaults = {
            "architectures": ["QWenLMHeadModel"],
            "model_type": "qwen",
            "no_bias": True,
            "tie_word_embeddings": False,
            "tokenizer_type": "QWenTokenizer",
            "torch_dtype": "bfloat16",
            "attn_dropout_prob": 0.0,
            "emb_dropout_prob": 0.0,
            "use_flash_attn": False,
            "scale_attn_weights": True,
            "use_cache": True,
            "bf16": False,
            "fp16": False,
            "fp32": False,
            "onnx_safe": None,
        }
        return defaults | extra | own | {"visual": visual}
