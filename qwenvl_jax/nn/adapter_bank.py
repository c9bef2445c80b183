"""Several low-rank adapters (`lora.py`) on one linear map, of which every row of a batch uses one or none.

For inference: many fine-tunings of one base model answer side by side, in one batch. Nothing is trained here; a single
adapter that is, and what DoRA does to the base's weights, is `AdaptedLinear`'s.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.nn.linear import project
from qwenvl_jax.nn.lora import copy


class BankedLinear(nnx.Module):
    """y = base(x) + (x A_m) B_m where m, from 1 on, is the adapter that a row has chosen; with 0 it is base(x).

    a [in, M, r] and b [M, r, *out] hold M adapters, with zeros where one has a smaller rank or none at all here, and
    with the scales in b. Layers may be stacked in front of both. Products run in the dtype of the base's result,
    accumulated in float32.
    """

    def __init__(self, base: Callable[[jax.Array], jax.Array], a: nnx.Param, b: nnx.Param):
        self.base = base
        self.a, self.b = a, b
        self.chosen: nnx.Variable | None = nnx.data(None)  # set by `with_chosen` for one call

    @property
    def adapters(self) -> int:
        """M."""
        return self.a.shape[-2]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, ..., in] -> [B, ..., *out] in the base's dtype. Where nothing was chosen, it is the base alone."""
        y = self.base(x)
        if self.chosen is None:
            return y
        change = self._of_one if len(self.chosen[...]) == 1 else self._of_each
        return (y + change(x, self.chosen[...], y.dtype)).astype(y.dtype)

    def _of_one(self, x: jax.Array, chosen: jax.Array, dtype) -> jax.Array:
        """What one adapter adds to all rows, float32: the others are not read."""
        place = jnp.maximum(chosen[0] - 1, 0)
        low = project(x, self.a[...][:, place].astype(dtype))
        return project(jnp.where(chosen[0] > 0, low, 0), self.b[...][place].astype(dtype), out_dtype=jnp.float32)

    def _of_each(self, x: jax.Array, chosen: jax.Array, dtype) -> jax.Array:
        """What the adapter of each row adds to it, float32.

        All adapters are one thin pair of matrices, of whose r M values between a row keeps its own: two plain products,
        where fetching the matrices of each row would move more than they hold.
        """
        low = project(x, self.a[...].astype(dtype))  # [B, ..., M, r]
        own = chosen[:, None] == jnp.arange(1, self.adapters + 1)
        low = jnp.where(own.reshape(len(chosen), *[1] * (x.ndim - 2), -1, 1), low, 0)
        b = self.b[...].astype(dtype)
        return project(low.reshape(*x.shape[:-1], -1), b.reshape(-1, *b.shape[2:]), out_dtype=jnp.float32)


def banked_linears(model: nnx.Module) -> dict[tuple[Any, ...], BankedLinear]:
    """All banks of a model by the path of attributes and list places that leads to them."""
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, BankedLinear)}


def with_chosen(model: Any, adapters: jax.Array | np.ndarray | None) -> Any:
    """The model for one call, in which each row of the batch uses the adapter of its number, 0 for none.

    adapters: int32 [B], or [1] for one adapter in all rows. None leaves the model as it is.
    """
    if adapters is None:
        return model
    model = copy(model)
    for bank in banked_linears(model).values():
        front = bank.a.shape[:-3]  # each layer of a stack gets the numbers when the stack is scanned
        bank.chosen = nnx.data(nnx.Variable(jnp.broadcast_to(adapters, (*front, *adapters.shape))))
    return model
