"""The vision transformer of Qwen-VL: OpenCLIP ViT-bigG/14 without class token, final norm and projection (Qwen-VL
paper, 2.1).

Pictures come in as normalised pixels and leave as one vector per patch; the resampler turns these into query features.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.nn.attention import attend
from qwenvl_jax.nn.linear import Linear
from qwenvl_jax.nn.norm import LayerNorm
from qwenvl_jax.sharding import along_batch

# So many layers train faster written out one after another: a loop stores what the backward pass needs in arrays of all
# layers, piece by piece, and takes it out again. Compiling a deeper stack in that way would take minutes.
FEW_LAYERS = 8


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: one axis of torch's bicubic interpolation (a = -0.75, borders clamped, no
    antialiasing).

    `jax.image.resize(method="cubic")` uses a = -0.5 and renormalises at the borders, which is another function.
    """
    a = -0.75
    weights = np.zeros((target, source), np.float64)
    for i in range(target):
        x = (i + 0.5) * source / target - 0.5
        base = math.floor(x)
        for tap in range(base - 1, base + 3):
            d = abs(x - tap)
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(tap, 0), source - 1)] += w
    return weights.astype(np.float32)


def resize_positions(table: jax.Array, target: int) -> jax.Array:
    """A square position table [g*g, C] resampled to [target*target, C], in float32 and back to its dtype."""
    source = math.isqrt(table.shape[0])
    if source == target:
        return table
    weights = jnp.asarray(bicubic_weights(source, target))
    square = table.astype(jnp.float32).reshape(source, source, -1)
    resized = jnp.einsum("ai,bj,ijc->abc", weights, weights, square, precision=jax.lax.Precision.HIGHEST)
    return resized.reshape(target * target, -1).astype(table.dtype)


class VitBlock(nnx.Module):
    """Pre-norm attention and MLP with the exact (erf) GELU."""

    def __init__(self, config: VisionConfig, *, residual_std: float, dtype, rngs: nnx.Rngs):
        width, epsilon = config.width, config.layer_norm_epsilon
        self.norm_attention = LayerNorm(width, epsilon=epsilon, dtype=dtype)
        # Per-head interleaving as in Megatron: [N, (q k v), H], unlike the language model and the resampler.
        qkv, qkv_axes = (config.heads, 3, config.head_dim), ("vit", "vit_heads", None, None)
        self.qkv = Linear(width, qkv, axes=qkv_axes, bias=True, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, axes=("vit_heads", "vit"), bias=True, dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(width, epsilon=epsilon, dtype=dtype)
        self.up = Linear(width, config.mlp_width, axes=("vit", "vit_mlp"), bias=True, dtype=dtype, rngs=rngs)
        self.down = Linear(
            config.mlp_width, width, axes=("vit_mlp", "vit"), bias=True, std=residual_std, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [I, P, W] -> [I, P, W]."""
        qkv = self.qkv(self.norm_attention(x))  # [I, P, N, 3, H]
        mixed = attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm_mlp(x)), approximate=False))


class Vit(nnx.Module):
    def __init__(self, config: VisionConfig, *, residual_std: float, dtype, rngs: nnx.Rngs):
        patch_values = 3 * config.patch_size**2
        self.config = config
        # The convolution of the original (stride = kernel size) is a product with flattened patches.
        self.patch_embedding = Linear(
            patch_values, config.width, axes=(None, "vit"), std=(3 * patch_values) ** -0.5, dtype=dtype, rngs=rngs
        )
        shape = (config.position_grid**2, config.width)
        self.positions = nnx.Param(
            (jax.random.normal(rngs.params(), shape) * config.width**-0.5).astype(dtype), axes=(None, "vit")
        )
        self.norm_pre = LayerNorm(config.width, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.blocks = jax.vmap(lambda keys: VitBlock(config, residual_std=residual_std, dtype=dtype, rngs=keys))(
            rngs.split(config.layers)
        )

    def embed(self, pixels: jax.Array) -> jax.Array:
        """pixels [I, 3, S, S] -> patch embeddings with positions [I, P, W], rows of the picture first."""
        images, grid, patch = pixels.shape[0], self.config.grid, self.config.patch_size
        patches = pixels.reshape(images, 3, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
        x = self.patch_embedding(patches.reshape(images, grid * grid, -1))
        return self.norm_pre(x + resize_positions(self.positions[...], grid))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [I, 3, S, S], normalised -> [I, P, W]."""

        def body(x, block):
            return along_batch(block(x)), None

        unroll = self.config.layers if self.config.layers <= FEW_LAYERS else 1
        return jax.lax.scan(body, along_batch(self.embed(pixels)), self.blocks, unroll=unroll)[0]
