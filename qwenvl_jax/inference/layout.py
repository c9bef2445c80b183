"""Where the arrays of inference lie on the devices of a model: decided here for all that is compiled.

On a mesh keys and values are split along heads N over `tensor`, as the weights that make them are, and whatever has a
row for each reply is split along rows R over `data` and `fsdp`, as far as the mesh divides them: a batch of one row is
on every device. So is what comes from the host, what the host reads, and the features of pictures.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.inference.steps import Grown, Past, State
from qwenvl_jax.sharding import DEFAULT_RULES

_KINDS = (Past, State, Grown)


class Layout:
    """That of a model with these arrays; the model on one device leaves nothing to be decided.

    A method takes a pytree of shapes or, in a function that is traced, of arrays, and returns it with their places.
    """

    def __init__(self, leaves: Sequence[jax.Array]):
        meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
        self.mesh = cast(Mesh, meshes[0]) if meshes else None
        one = leaves[0].sharding  # None of a shape
        self.devices = list(self.mesh.devices.flat) if self.mesh is not None else list(one.device_set) if one else []

    def everywhere(self, tree: Any) -> Any:
        """A copy on every device."""
        return jax.tree.map(lambda leaf: self._placed(leaf), tree)

    def rows(self, tree: Any) -> Any:
        """Of arrays [R, ...]."""
        return jax.tree.map(lambda leaf: self._placed(leaf, "batch"), tree)

    def tokens(self, tree: Any) -> Any:
        """Of keys and values, [R, N, S, H] and whatever else has rows and heads."""
        return jax.tree.map(lambda leaf: self._placed(leaf, "batch", "heads"), tree)

    def batch(self, tree: Any) -> Any:
        """Of any of `Past`, `State`, `Fixed` and `Grown`, each as is right for its parts; all else has rows."""

        def one(part: Any) -> Any:
            match part:
                case Past():
                    return self.tokens(part)
                case State():
                    recent_k, recent_v = self.tokens(part.recent_k), self.tokens(part.recent_v)
                    return self.rows(part)._replace(recent_k=recent_k, recent_v=recent_v)
                case Grown():
                    return self.everywhere(part)
            return self.rows(part)

        return jax.tree.map(one, tree, is_leaf=lambda part: isinstance(part, _KINDS))

    def given(self, tree: Any) -> Any:
        """The arguments of a program: what has no place yet comes from the host."""

        def one(leaf: Any) -> Any:
            if not hasattr(leaf, "shape") or getattr(leaf, "sharding", None) is not None:
                return leaf
            return self._placed(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

        return jax.tree.map(one, tree) if self.mesh is not None else tree

    def zeros(self, tree: Any) -> Any:
        """Arrays of zeros of these shapes, made by no program: there would be one for each shape."""

        def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if self.mesh is None:
                return jax.device_put(np.zeros(leaf.shape, leaf.dtype))
            shard = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: shard)

        return jax.tree.map(one, tree)

    def _placed(self, leaf: Any, *axes: str) -> Any:
        """A leaf whose first dimensions are these logical axes."""
        if self.mesh is None:
            return leaf
        named = (*axes, *[None] * (len(leaf.shape) - len(axes)))
        sharding = NamedSharding(self.mesh, DEFAULT_RULES.spec(named, leaf.shape, self.mesh))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.lax.with_sharding_constraint(leaf, sharding)
