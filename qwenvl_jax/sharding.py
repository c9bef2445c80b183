"""Which part of the model lies on which device: meshes, and rules from the model's logical axes to mesh axes.

Every parameter names its logical axes (`axes` metadata of `nnx.Param`); a `ShardingRules` says over which mesh axis
each of them is split. The compiler inserts the communication. Nothing here knows a model.

A mesh always has three axes: `data` (copies of the model, the batch is split), `fsdp` (parameters and optimizer state
are split and gathered for use, the batch is split too; ZeRO stage 3: Rajbhandari et al. 2020) and `tensor` (matrices
are split and stay so; Megatron: Shoeybi et al. 2019).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.config import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which a batch is split, by every preset: an axis that it lacks has one device

# One mesh axis, several (the first is the outermost), or none: not split.
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes over which each logical axis is split.

    A dimension that its mesh axes do not divide is split over fewer of them, the last dropped first, down to not at
    all: three attention heads on two devices are copied, not padded. Two dimensions of one parameter on one mesh axis
    are an error. A mesh axis of size one splits nothing.
    """

    batch: MeshAxes = None  # sequences of a batch and pictures
    embed: MeshAxes = None  # D, the residual stream of the language model
    heads: MeshAxes = None  # N * H, attention heads of language model and resampler
    mlp: MeshAxes = None  # F
    vocab: MeshAxes = None  # V
    vit: MeshAxes = None  # the residual stream of the vision transformer
    vit_heads: MeshAxes = None
    vit_mlp: MeshAxes = None

    def spec(
        self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str = "an array"
    ) -> PartitionSpec:
        """The partition of an array of this shape whose last dimensions are these logical axes.

        Dimensions in front of them (stacked layers) are not split. Raises UserError for an unknown logical or mesh axis
        and for a mesh axis used twice; `name` is what the message calls the array.
        """
        used: dict[str, str] = {}
        parts: list[MeshAxes] = [None] * (len(shape) - len(axes))
        for axis, size in zip(axes, shape[len(parts) :], strict=True):
            wanted = self._mesh_axes(axis, mesh, name)
            for mesh_axis in wanted:
                if mesh_axis in used:
                    raise UserError(
                        f"sharding rules: {used[mesh_axis]!r} and {axis!r} of {name} "
                        f"are both on mesh axis {mesh_axis!r}"
                    )
                used[mesh_axis] = str(axis)
            while wanted and size % math.prod(mesh.shape[a] for a in wanted):
                wanted = wanted[:-1]
            parts.append(wanted[0] if len(wanted) == 1 else wanted or None)
        return PartitionSpec(*parts)

    def _mesh_axes(self, axis: str | None, mesh: Mesh, name: str) -> tuple[str, ...]:
        if axis is None:
            return ()
        if axis not in {field.name for field in dataclasses.fields(self)}:
            raise UserError(f"sharding rules: {name} has a logical axis {axis!r} that no rule is about")
        value = getattr(self, axis)
        wanted = (value,) if isinstance(value, str) else tuple(value or ())
        for mesh_axis in wanted:
            if mesh_axis not in mesh.shape:
                raise UserError(
                    f"sharding rules: {axis} = {mesh_axis!r}, but the mesh has the axes {', '.join(mesh.axis_names)}; "
                    "make_mesh makes one with all of them"
                )
        return wanted


_FSDP = ShardingRules(batch=("data", "fsdp"), embed="fsdp", vit_heads="fsdp", vit_mlp="fsdp")
_TENSOR = ShardingRules(
    batch="data", heads="tensor", mlp="tensor", vocab="tensor", vit_heads="tensor", vit_mlp="tensor"
)

# The vision tower is split by heads and hidden units under either kind: its residual axis meets `embed` in one matrix.
PRESETS = {
    "single": ShardingRules(),
    "fsdp": _FSDP,
    "fsdp_tensor": dataclasses.replace(
        _TENSOR, batch=_FSDP.batch, embed=_FSDP.embed, vit_heads=("tensor", "fsdp"), vit_mlp=("tensor", "fsdp")
    ),
    "tensor": _TENSOR,
}


# On a mesh of whatever shape these split over every axis that has more than one device.
DEFAULT_RULES = PRESETS["fsdp_tensor"]


def preset_rules(preset: str) -> ShardingRules:
    """The rules of this name: single, fsdp, fsdp_tensor or tensor."""
    if preset not in PRESETS:
        raise UserError(f"unknown sharding preset {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def make_mesh(
    preset: str = "single", devices: Sequence[jax.Device] | None = None, *, data: int = 1, tensor: int | None = None
) -> Mesh:
    """A mesh of all the devices for a preset: `data` copies of the model, each over `tensor` devices times the rest.

    devices: default all there are; `single` takes the first. tensor: default 2 for `fsdp_tensor`, and as many as there
    are for `tensor`; the other presets have none. Raises UserError if the numbers do not fit.
    """
    preset_rules(preset)
    devices = list(jax.devices() if devices is None else devices)
    if preset == "single":
        devices = devices[:1]
    if tensor is None:
        tensor = {"fsdp_tensor": 2, "tensor": len(devices) // max(data, 1)}.get(preset, 1)
    fsdp = len(devices) // max(data * tensor, 1)
    if data < 1 or tensor < 1 or data * fsdp * tensor != len(devices):
        raise UserError(f"mesh: data {data} x tensor {tensor} does not divide the {len(devices)} devices")
    if (fsdp > 1 and "fsdp" not in preset) or (tensor > 1 and "tensor" not in preset):
        raise UserError(f"mesh: preset {preset} has no use for data {data} x fsdp {fsdp} x tensor {tensor} devices")
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_name(path: Sequence[Any]) -> str:
    """A key path of a model's pytree as a dotted name, "layers.3.qkv.kernel", without the variable's own `value`."""
    names = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return ".".join(names[:-1] if names[-1] == "value" else names)


def param_paths(model: Any) -> dict[str, Any]:
    """The leaves of a model (arrays, shapes, shardings) by dotted path, in the order of `jax.tree.leaves`.

    A list of layers gives "layers.3.qkv.kernel" where stacked layers give "layers.qkv.kernel"; see `split_layer`.
    """
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def split_layer(path: str) -> tuple[str, int | None]:
    """("layers.qkv.kernel", 3) for "layers.3.qkv.kernel"; the path itself and None where no layer is counted."""
    match = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", path)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (path, None)


def param_shardings(model: Any, mesh: Mesh, rules: ShardingRules | None = None) -> Any:
    """The sharding of every parameter, as a pytree of the model's structure with NamedSharding leaves.

    model: a model, or its shapes from `nnx.eval_shape`. Fits `jax.device_put(model, ...)` and jit's `out_shardings`; by
    name through `param_paths`. What is not an `nnx.Param` with `axes` is copied to all devices.
    """
    rules = DEFAULT_RULES if rules is None else rules
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError("mesh: its axes must be of type Auto (make_mesh), where the compiler inserts communication")

    def one(path, variable):
        axes = variable.get_metadata().get("axes", ()) if isinstance(variable, nnx.Variable) else ()
        return jax.tree.map(
            lambda leaf: NamedSharding(mesh, rules.spec(axes, leaf.shape, mesh, path_name(path))), variable
        )

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh, rules: ShardingRules | None = None) -> NamedSharding:
    """The sharding of an array whose first dimension is the batch."""
    rules = DEFAULT_RULES if rules is None else rules
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, traced so that `along_batch` in it is about this mesh; for jit."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def along_batch(x: jax.Array) -> jax.Array:
    """x [B, ...], held so that each device has its part of the batch with all of the other dimensions.

    Without it the compiler may keep activations as the weights lie, split by D with every sequence on every device, and
    add up products over devices where it should fetch weights. Outside `on_mesh` it is x.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def batch_shards() -> int:
    """Into how many parts `along_batch` divides a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
