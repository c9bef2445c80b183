"""Low-rank adapters (LoRA: Hu et al. 2021) on linear maps, with rank-stabilised scale and DoRA.

An `AdaptedLinear` stands where a linear map stood, is called like it, and trains two thin matrices beside it. What is
under it may be a `Linear` or anything that is called like one, for example a quantised one. Not here: which maps of a
model get an adapter (`checkpoints/adapters.py`) and what it is called in files (`checkpoints/peft.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.config import UserError
from qwenvl_jax.nn.linear import Linear, project


@dataclasses.dataclass(frozen=True)
class LoraRecipe:
    """What an adapter is. The defaults are those of the original's fine-tuning script.

    targets and modules_to_save are names of modules in the checkpoint, whole or their last parts ("attn.c_proj" is the
    attention's output in every layer, "mlp.c_proj" the MLP's); "*" stands for anything. The vision
    transformer has "in_proj", "out_proj" and "c_fc", the resampler "kv_proj"; its attention can be trained whole, with
    "attn_pool" among the modules to save.
    """

    rank: int = 64
    alpha: float = 16.0  # the change is multiplied by alpha / rank
    dropout: float = 0.05  # of the adapter's input, in training
    targets: tuple[str, ...] = ("c_attn", "attn.c_proj", "w1", "w2")
    use_rslora: bool = False  # alpha / sqrt(rank) instead (Kalajdzievski 2023)
    use_dora: bool = False  # also train the length of every output's weights (Liu et al. 2024)
    loraplus_ratio: float = 1.0  # learning rate of B over that of A (LoRA+: Hayou et al. 2024)
    bias: Literal["none", "all", "lora_only"] = "none"  # biases trained and saved: none, all, those of the targets
    # Modules trained whole and saved with the adapter. None: as the original, wte and lm_head for a base model, which
    # has not learnt the tokens of a chat, and none for a chat model; see `for_checkpoint`.
    modules_to_save: tuple[str, ...] | None = None

    def __post_init__(self):
        problems = []
        if self.rank < 1:
            problems.append(f"rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0:
            problems.append(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; it must lie in 0..1, below 1")
        if self.loraplus_ratio <= 0:
            problems.append(f"loraplus_ratio is {self.loraplus_ratio}; it must be above 0")
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias is {self.bias!r}; use one of none, all, lora_only")
        if not self.targets:
            problems.append("targets is empty; name at least one module")
        if problems:
            raise UserError("lora: " + "; ".join(problems))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def for_checkpoint(self, generation_config: Mapping[str, Any] | None) -> "LoraRecipe":
        """The recipe with `modules_to_save` decided by whether the checkpoint's generation_config.json says chat."""
        if self.modules_to_save is not None:
            return self
        is_chat = (generation_config or {}).get("chat_format", "chatml") == "chatml"
        return dataclasses.replace(self, modules_to_save=() if is_chat else ("wte", "lm_head"))


class AdaptedLinear(nnx.Module):
    """y = base(x) + scale * (x A) B, with A [in, r] and B [r, *out] in float32; B starts at zero.

    Products run in the dtype of the base's result, accumulated in float32. With DoRA the weight W + scale * A B is
    brought to a trained length per output, `magnitude` [*out] (PEFT's form: the length it had is a constant for the
    gradient; dropout touches the low-rank path alone). Layers may be stacked in front of all of these.
    """

    def __init__(
        self,
        base: Callable[[jax.Array], jax.Array],
        shape: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        recipe: LoraRecipe,
        stack: int | None = None,
        rngs: nnx.Rngs | None,
    ):
        """shape: [in, *out] of one layer, and `axes` its logical axes; stack: number of layers in front, None for none.

        rngs: where A comes from; None leaves zeros, for values that are loaded afterwards.
        """
        front = () if stack is None else (stack,)
        a_shape, bound = (*front, shape[0], recipe.rank), shape[0] ** -0.5
        a = (
            jnp.zeros(a_shape)
            if rngs is None
            else jax.random.uniform(rngs.params(), a_shape, minval=-bound, maxval=bound)
        )
        self.base = base
        self.a = nnx.Param(a, axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((*front, recipe.rank, *shape[1:])), axes=(None, *axes[1:]))
        lengths = jnp.zeros((*front, *shape[1:]))
        if recipe.use_dora and rngs is not None:
            kernel = dense_kernel(base, shape[0]) if stack is None else _dense_kernels(base, shape[0])
            lengths = _lengths(kernel, len(front))
        self.magnitude = nnx.Param(lengths, axes=axes[1:]) if recipe.use_dora else None
        self.scale = recipe.scale
        self.dropout = recipe.dropout
        self.key: nnx.Variable | None = nnx.data(None)  # set by `with_dropout` for one step of training

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., *out] in the base's dtype."""
        y = self.base(x)
        change = self._change(x, y.dtype)
        if self.magnitude is None:
            return (y + change).astype(y.dtype)
        kernel = dense_kernel(self.base, x.shape[-1])
        norm = jax.lax.stop_gradient(_lengths(kernel + self._weight_change(), 0))
        strength = self.magnitude[...] / norm
        product = y.astype(jnp.float32) - self.base(jnp.zeros((1, x.shape[-1]), x.dtype))[0]
        return (y + (strength - 1) * product + strength * change).astype(y.dtype)

    def merged(self) -> Linear:
        """The `Linear` that computes the same without an adapter: the sum in float32, rounded to the base's dtype.

        Raises UserError for a base without dense weights, which the sum would not fit into.
        """
        if not isinstance(self.base, Linear):
            raise UserError("an adapter cannot be merged into quantised weights; merge it into the full checkpoint")
        result = copy(self.base)
        kernel = result.kernel[...]
        merged = kernel.astype(jnp.float32) + self._weight_change()
        if self.magnitude is not None:
            front = self.a[...].ndim - 2
            strength = self.magnitude[...] / _lengths(merged, front)
            merged = merged * jnp.expand_dims(strength, front)
        result.kernel = self.base.kernel.replace(merged.astype(kernel.dtype))  # the base keeps its own
        return result

    def _change(self, x: jax.Array, dtype) -> jax.Array:
        """What the adapter adds before DoRA, float32."""
        if self.key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        low = project(x, self.a[...].astype(dtype))
        return self.scale * project(low, self.b[...].astype(dtype), out_dtype=jnp.float32)

    def _weight_change(self) -> jax.Array:
        """scale * A B, float32 [in, *out], with the stacked layers in front where there are any."""
        a, b = self.a[...], self.b[...]
        flat = b.reshape(*b.shape[: a.ndim - 1], -1)
        product = jnp.matmul(a, flat, precision=jax.lax.Precision.HIGHEST)
        return self.scale * product.reshape(*a.shape[:-1], *b.shape[a.ndim - 1 :])


def _lengths(kernel: jax.Array, in_axis: int) -> jax.Array:
    """The length of each output's weights, float32."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=in_axis))


def dense_kernel(base: Callable[[jax.Array], jax.Array], in_dim: int) -> jax.Array:
    """The weights [in, *out] of one layer in float32; those of a map that stores them otherwise, from its answers."""
    if isinstance(base, Linear):
        return base.kernel[...].astype(jnp.float32)
    rows = base(jnp.eye(in_dim)).astype(jnp.float32)
    return rows - base(jnp.zeros((1, in_dim))).astype(jnp.float32)


def _dense_kernels(stacked: Any, in_dim: int) -> jax.Array:
    return jax.vmap(lambda base: dense_kernel(base, in_dim))(stacked)


def copy(module: Any) -> Any:
    """A copy of the structure of a module; its variables are shared, so set attributes and not their values."""
    return nnx.merge(*nnx.split(module))


def adapted_linears(model: nnx.Module) -> dict[tuple[Any, ...], AdaptedLinear]:
    """All adapters of a model by the path of attributes and list places that leads to them."""
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, AdaptedLinear)}


def with_dropout(model: Any, key: jax.Array) -> Any:
    """The model for one step of training: every adapter (and every layer of a stack) drops by a key of its own.

    key: a key of this step, as `jax.random.fold_in(run_key, step)`. Without this call nothing is dropped.
    """
    model = copy(model)
    for number, layer in enumerate(adapted_linears(model).values()):
        own, front = jax.random.fold_in(key, number), layer.a[...].shape[:-2]
        layer.key = nnx.data(nnx.Variable(jax.random.split(own, front) if front else own))
    return model


def merge_adapters(model: Any) -> Any:
    """The model with every adapter added into the weights under it, see `AdaptedLinear.merged`."""
    model = copy(model)
    for path, layer in adapted_linears(model).items():
        *above, name = path
        parent = model
        for step in above:
            parent = parent[step] if isinstance(step, int) else getattr(parent, step)
        setattr(parent, str(name), layer.merged())
    return model
