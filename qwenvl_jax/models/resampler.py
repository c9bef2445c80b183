"""The resampler: learned queries read the patch features by one cross-attention (Qwen-VL paper, 2.1, "position-aware
vision-language adapter"), followed by the norm and the projection into the language model's space."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.models.vit import resize_positions
from qwenvl_jax.nn.attention import attend
from qwenvl_jax.nn.linear import Linear, full_precision
from qwenvl_jax.nn.norm import LayerNorm
from qwenvl_jax.sharding import along_batch


def sincos_positions(dim: int, grid: int) -> np.ndarray:
    """float32 [grid*grid, dim]: sines and cosines, the first half of the vector for the column, the second for the row.

    Row-major over the grid (He et al. 2022, "Masked Autoencoders", code of the 2-D table).
    """
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float32) / (dim / 4.0))
    angles = np.arange(grid, dtype=np.float32)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, dim / 2]
    columns = np.broadcast_to(line[None, :, :], (grid, grid, dim // 2))
    rows = np.broadcast_to(line[:, None, :], (grid, grid, dim // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(grid * grid, dim).astype(np.float32)


class CrossAttention(nnx.Module):
    """Multi-head attention whose three input projections are the thirds of one weight [D, 3, D]."""

    def __init__(self, dim: int, heads: int, *, dtype, rngs: nnx.Rngs):
        self.heads = heads
        # Glorot's std for a [3D, D] matrix, torch's default for this weight.
        std = dim**-0.5 / 2**0.5
        self.qkv = Linear(dim, (3, dim), axes=("embed", None, "heads"), bias=True, std=std, dtype=dtype, rngs=rngs)
        self.out = Linear(dim, dim, axes=("heads", "embed"), bias=True, dtype=dtype, rngs=rngs)

    def project(self, x: jax.Array, which: int) -> jax.Array:
        """x [I, S, D] through the query (0), key (1) or value (2) third -> [I, S, N, H]."""
        assert self.qkv.bias is not None
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
        y = jnp.einsum("isd,de->ise", x, kernel[:, which], precision=full_precision(kernel.dtype)) + bias[which]
        return y.reshape(*y.shape[:2], self.heads, -1)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """query [I, Q, D]; key, value [I, P, D] -> [I, Q, D]."""
        mixed = attend(self.project(query, 0), self.project(key, 1), self.project(value, 2))
        return self.out(mixed.reshape(query.shape))


class Resampler(nnx.Module):
    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        dim, epsilon = config.output_dim, config.layer_norm_epsilon
        self.config = config
        self.positions = nnx.Param(jnp.asarray(sincos_positions(dim, config.query_grid), dtype), axes=(None, "embed"))
        self.query = nnx.Param(
            (0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (config.n_queries, dim))).astype(dtype),
            axes=(None, "embed"),
        )
        # The original leaves the projection out when both widths agree.
        narrow = config.width != dim
        self.kv = Linear(config.width, dim, axes=("vit", "embed"), dtype=dtype, rngs=rngs) if narrow else None
        self.attention = CrossAttention(dim, config.resampler_heads, dtype=dtype, rngs=rngs)
        self.norm_query = LayerNorm(dim, epsilon=epsilon, dtype=dtype)
        self.norm_kv = LayerNorm(dim, epsilon=epsilon, dtype=dtype)

    def __call__(self, patches: jax.Array) -> jax.Array:
        """patches [I, P, W] -> [I, Q, D]. Keys carry positions, values do not."""
        kv = along_batch(self.norm_kv(patches if self.kv is None else self.kv(patches)))
        query = self.norm_query(self.query[...]) + self.positions[...]
        query = along_batch(jnp.broadcast_to(query, (patches.shape[0], *query.shape)))
        return along_batch(self.attention(query, kv + resize_positions(self.positions[...], self.config.grid), kv))
