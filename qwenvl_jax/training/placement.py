"""Where the arrays of a run lie: parameters, optimizer memory and batches on a mesh of devices of one or many hosts."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.config import UserError
from qwenvl_jax.sharding import batch_sharding, make_mesh, param_paths, param_shardings, preset_rules


@dataclasses.dataclass(frozen=True)
class MeshRecipe:
    """The devices of a run, see `sharding.make_mesh`: all there are, but for `single`, which takes the first."""

    preset: Literal["single", "fsdp", "fsdp_tensor", "tensor"] = "single"
    data: int = 1  # copies of the model
    tensor: int | None = None  # devices that share each matrix; None: 2 for fsdp_tensor, all for tensor


class Placement:
    """The mesh of a run, and what goes where on it."""

    def __init__(self, recipe: MeshRecipe, batch_size: int, devices: Sequence[jax.Device] | None = None):
        """devices: of the mesh, all there are by default; those of a plan are not there."""
        self.mesh = make_mesh(recipe.preset, devices, data=recipe.data, tensor=recipe.tensor)
        self.rules = preset_rules(recipe.preset)
        self.batch_size = batch_size
        self.by_batch = batch_sharding(self.mesh, self.rules)
        shards = int(np.prod([self.mesh.shape[axis] for axis in _axes(self.by_batch.spec)]))
        if batch_size % shards:
            raise UserError(
                f"the {batch_size} sequences of a batch cannot be divided over {shards} shards of the mesh; "
                "batch_size / accumulate must be a multiple of them"
            )

    @cached_property
    def rows(self) -> range:
        """Those of a global batch that this process reads; processes that share matrices read the same ones."""
        indices = self.by_batch.addressable_devices_indices_map((self.batch_size,)).values()
        held = [index[0].indices(self.batch_size)[:2] for index in indices if index is not None]
        rows = range(min(start for start, _ in held), max(stop for _, stop in held))
        if {row for start, stop in held for row in range(start, stop)} != set(rows):
            raise UserError("the devices of this process hold batch rows with gaps; order the mesh by process")
        return rows

    def parameters(self, modules: Any) -> dict[str, NamedSharding]:
        """The sharding of every parameter of the modules, by path."""
        return param_paths(param_shardings(modules, self.mesh, self.rules))

    def optimizer_shapes(self, optimizer: optax.GradientTransformation, params: dict[str, jax.Array]) -> Any:
        """The optimizer's memory as shapes: what is shaped like a parameter lies as it does, the rest everywhere."""
        wide = {path: jax.ShapeDtypeStruct(value.shape, np.float32) for path, value in params.items()}

        def placed(where, leaf) -> jax.ShapeDtypeStruct:
            owner = next((params[k.key] for k in reversed(where) if getattr(k, "key", None) in params), None)
            sharding = self.everywhere if owner is None or owner.shape != leaf.shape else owner.sharding
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, wide))

    def optimizer(self, optimizer: optax.GradientTransformation, params: dict[str, jax.Array]) -> Any:
        """The optimizer's fresh memory."""
        memory = jax.tree.map(lambda leaf: leaf.sharding, self.optimizer_shapes(optimizer, params))
        start = jax.jit(lambda p: optimizer.init({k: v.astype(np.float32) for k, v in p.items()}), out_shardings=memory)
        return start(params)

    @property
    def everywhere(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def of_step(self) -> NamedSharding:
        """That of the arrays [A, B, ...] of a step's batches: divided along the second axis."""
        return NamedSharding(self.mesh, PartitionSpec(None, *self.by_batch.spec))

    def batches(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's part [A, ...] of A batches, as global arrays whose second axis is divided over the mesh."""
        shares = self.batch_size // len(self.rows)

        def place(value: np.ndarray) -> jax.Array:
            shape = (value.shape[0], value.shape[1] * shares, *value.shape[2:])
            return jax.make_array_from_process_local_data(self.of_step, value, shape)

        return {name: place(value) for name, value in local.items()}


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a partition uses."""
    return tuple(a for part in spec if part for a in ((part,) if isinstance(part, str) else part))
