"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, *, epsilon: float, dtype):
        self.scale = nnx.Param(jnp.ones(dim, dtype), axes=(None,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D]. Cast back before the weight is applied: the original rounds there, which bfloat16 shows."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * self.scale[...]


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, *, epsilon: float, dtype):
        self.scale = nnx.Param(jnp.ones(dim, dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(dim, dtype), axes=(None,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D] in x's dtype."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
