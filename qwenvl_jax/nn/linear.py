"""Linear maps and embeddings, the only places where weights meet activations.

Weights keep the dtype they are stored in and products run in that dtype, accumulated in float32. Products of float32
weights use full float32 precision everywhere (GPUs and TPUs would otherwise use TF32 or bfloat16 passes).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def full_precision(dtype) -> jax.lax.Precision | None:
    """Float32 means float32; narrower types take the hardware's own product."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def normal(rngs: nnx.Rngs, shape: Sequence[int], std: float, dtype) -> jax.Array:
    return (std * jax.random.normal(rngs.params(), shape)).astype(dtype)


def project(x: jax.Array, kernel: jax.Array, *, out_dtype=None) -> jax.Array:
    """x [..., in] times kernel [in, *out] -> [..., *out], in the kernel's dtype; `out_dtype` is that of the result."""
    # Two-dimensional operands: the backward pass of a batched product is twice as slow on CPUs.
    y = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]).astype(kernel.dtype),
        kernel,
        (((1,), (0,)), ((), ())),
        precision=full_precision(kernel.dtype),
        preferred_element_type=out_dtype,
    )
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


class Linear(nnx.Module):
    """y = x W + b with W of shape [in, *out].

    `out` may have several axes (a fused projection is [D, 3, N*H]), so that one axis of it can be sharded. `axes` names
    the logical axes of W for the sharding rules; layers stacked in front of them are not counted.
    """

    def __init__(
        self,
        in_dim: int,
        out: int | tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        bias: bool = False,
        std: float = 0.02,
        dtype,
        rngs: nnx.Rngs,
    ):
        out = (out,) if isinstance(out, int) else out
        self.kernel = nnx.Param(normal(rngs, (in_dim, *out), std, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(out, dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., *out] in the weights' dtype."""
        y = project(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """A table [V, D] of which rows are looked up."""

    def __init__(self, rows: int, dim: int, *, axes: tuple[str, str], std: float = 0.02, dtype, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs, (rows, dim), std, dtype), axes=axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [...] -> [..., D]."""
        return self.table[...][ids]
