"""Linear maps whose weights are stored in 8 or 4 bits and widened for each use.

They are called like `Linear`, take part in `jit`, `scan` and `vmap` like it, and let gradients through to their input.
The weights are constants: no gradient is computed for them. The widened weights exist for the length of one product;
they are neither kept for the backward pass nor computed ahead of a loop. Which maps of a model are quantised, and how
files store them, is not here.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.nn.linear import Linear, full_precision

# The 16 values of NormalFloat (Dettmers et al. 2023, QLoRA, section 3 and appendix E): quantiles of the normal
# distribution, eight above zero, seven below, and zero, divided by the largest.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64  # input rows that share a scale
DOUBLE_BLOCK = 256  # scales that share a scale of their own, along the last output axis

# What lies halfway between two steps takes the one nearer to zero, however a compiler rounds quotients. That is common:
# weights have few digits, and the largest of a group of int4 is 7.5 steps from zero.
TIES_TO_ZERO = 1 - 2**-20


class Frozen(nnx.Variable):
    """A part of a quantised weight. Not an `nnx.Param`, so what selects parameters to train leaves it out."""


class QuantisedLinear(nnx.Module):
    """y = x W + b with W [in, *out] in another form. The input decides the dtype, since these weights have none."""

    codes: Frozen
    bias: nnx.Param | None  # [*out]

    def stored_rows(self, dtype) -> jax.Array:
        """W with its rows in the order in which they are stored."""
        raise NotImplementedError

    def dequantised(self, dtype) -> jax.Array:
        """W [in, *out]; computed in float32, then rounded."""
        return self.stored_rows(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., *out] in x's dtype."""
        y = _product(x, self)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


@jax.custom_vjp
def _product(x: jax.Array, linear: QuantisedLinear) -> jax.Array:
    """x [..., in] times the stored rows of a map."""
    kernel = _tied(linear, x).stored_rows(x.dtype)
    y = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision=full_precision(x.dtype)
    )
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def _product_forward(x: jax.Array, linear: QuantisedLinear):
    return _product(x, linear), linear


def _product_backward(linear: QuantisedLinear, gradient: jax.Array):
    kernel = _tied(linear, gradient).stored_rows(gradient.dtype)
    in_dim, *out = kernel.shape
    front = gradient.shape[: gradient.ndim - len(out)]
    axes = tuple(range(1, 1 + len(out)))
    by_x = jax.lax.dot_general(
        gradient.reshape(-1, *out), kernel, ((axes, axes), ((), ())), precision=full_precision(gradient.dtype)
    )
    return by_x.reshape(*front, in_dim), None


_product.defvjp(_product_forward, _product_backward)


def _tied(linear: QuantisedLinear, to: jax.Array) -> QuantisedLinear:
    """The same map, whose codes the compiler must take for a function of `to`.

    Otherwise it may widen the weights of all layers ahead of a loop over tokens, and keep them all through it.
    """
    result = jax.tree.map(lambda part: part, linear)
    result.codes = Frozen(tied(linear.codes[...], to), axes=_axes(linear.codes))
    return result


def tied(codes: jax.Array, to: jax.Array) -> jax.Array:
    """Codes that do not change, which the compiler must take for a function of `to`."""
    return jax.lax.platform_dependent(codes, to, cpu=_tied_by_value, default=_tied_by_barrier)


def _tied_by_barrier(codes: jax.Array, to: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((codes, to))[0]


def _tied_by_value(codes: jax.Array, to: jax.Array) -> jax.Array:
    """The compiler for CPUs drops barriers before it looks at loops, so zero is added, which it cannot know is zero."""
    return codes + jnp.minimum(jnp.abs(to.reshape(-1)[0]), 0).astype(codes.dtype)


class Int8Linear(QuantisedLinear):
    """W = codes * scale with int8 codes [in, *out] and one float32 scale per output: symmetric, round to nearest."""

    def __init__(
        self, codes: jax.Array, scale: jax.Array, *, axes: tuple[str | None, ...], bias: nnx.Param | None = None
    ):
        self.codes = Frozen(codes, axes=axes)
        self.scale = Frozen(scale, axes=axes[1:])
        self.bias = bias

    @classmethod
    def quantise(cls, linear: Linear) -> "Int8Linear":
        kernel = linear.kernel[...].astype(jnp.float32)
        scale = _no_zeros(jnp.max(jnp.abs(kernel), axis=0) * (1 / 127))
        codes = jnp.clip(jnp.round(kernel / scale), -127, 127).astype(jnp.int8)
        return cls(codes, scale, axes=_axes(linear.kernel), bias=linear.bias)

    def stored_rows(self, dtype) -> jax.Array:
        return (self.codes[...].astype(jnp.float32) * self.scale[...]).astype(dtype)


class Int4Linear(QuantisedLinear):
    """W = (q - zero) * scale with q 0..15, and a scale and a zero point for every `group_size` rows of an output.

    codes uint8 [in / 2, *out]: rows 2i in the low and 2i + 1 in the high half of a byte. scale float [groups, *out],
    zero uint8 [groups, *out] (0..16). This is what GPTQ's checkpoints hold (Frantar et al. 2022). order int32 [in]:
    which input each stored row belongs to, where rows were grouped by importance; None for their natural order.
    """

    def __init__(
        self,
        codes: jax.Array,
        scale: jax.Array,
        zero: jax.Array,
        *,
        axes: tuple[str | None, ...],
        group_size: int,
        order: jax.Array | None = None,
        bias: nnx.Param | None = None,
    ):
        self.codes = Frozen(codes, axes=axes)
        self.scale = Frozen(scale, axes=axes)
        self.zero = Frozen(zero, axes=axes)
        self.order = None if order is None else Frozen(order, axes=(None,))
        self.group_size = group_size
        self.bias = bias

    @classmethod
    def quantise(cls, linear: Linear, group_size: int = 128, *, ordered: bool = False) -> "Int4Linear":
        """Symmetric, round to nearest: the zero point is 8, and scales are float16 as in GPTQ's files.

        group_size: -1 for one group. ordered: with an `order`, the natural one.
        """
        kernel = linear.kernel[...].astype(jnp.float32)
        group_size = len(kernel) if group_size == -1 else group_size
        largest = _by_groups(jnp.max, jnp.abs(kernel), group_size)
        scale = _no_zeros(_round_to_float16(largest * (1 / 7.5)))
        steps = jnp.round(kernel / _per_row(scale, group_size, len(kernel)) * TIES_TO_ZERO)
        codes = _pack((jnp.clip(steps, -8, 7) + 8).astype(jnp.uint8))
        zero = jnp.full(scale.shape, 8, jnp.uint8)
        order = jnp.arange(len(kernel), dtype=jnp.int32) if ordered else None
        return cls(
            codes,
            scale.astype(jnp.float16),
            zero,
            axes=_axes(linear.kernel),
            group_size=group_size,
            order=order,
            bias=linear.bias,
        )

    @property
    def in_dim(self) -> int:
        return 2 * self.codes.shape[-len(_axes(self.codes))]  # whether or not layers are stacked in front

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x if self.order is None else x[..., self.order[...]])

    def stored_rows(self, dtype) -> jax.Array:
        q = _unpack(self.codes[...])
        zero, scale = (
            _per_row(part[...].astype(jnp.float32), self.group_size, len(q)) for part in (self.zero, self.scale)
        )
        return ((q.astype(jnp.float32) - zero) * scale).astype(dtype)

    def dequantised(self, dtype) -> jax.Array:
        rows = self.stored_rows(dtype)
        return rows if self.order is None else rows[jnp.argsort(self.order[...])]


class NF4Linear(QuantisedLinear):
    """W = NF4_VALUES[q] * scale, one scale for every 64 rows of an output: the largest weight among them (QLoRA).

    codes uint8 [in / 2, *out] as in `Int4Linear`. scale: float32 [blocks, *out], or with double quantisation int8:
    how many times `step` from `middle`, both float32 [blocks, ..., out / 256].
    """

    def __init__(
        self,
        codes: jax.Array,
        scale: jax.Array,
        step: jax.Array | None = None,
        middle: jax.Array | None = None,
        *,
        axes: tuple[str | None, ...],
        bias: nnx.Param | None = None,
    ):
        self.codes = Frozen(codes, axes=axes)
        self.scale = Frozen(scale, axes=axes)
        self.step = None if step is None else Frozen(step, axes=axes)
        self.middle = None if middle is None else Frozen(middle, axes=axes)
        self.bias = bias

    @classmethod
    def quantise(cls, linear: Linear, *, double: bool = True) -> "NF4Linear":
        """Every weight becomes the nearest value. double: quantise the scales, too.

        The paper stores the scales' distances from their common mean as 8-bit floats. Equal steps around the middle of
        each 256 are closer, and do not depend on the order of a sum, which differs between devices.
        """
        kernel = linear.kernel[...].astype(jnp.float32)
        scale = _by_groups(jnp.max, jnp.abs(kernel), NF4_BLOCK)
        step: jax.Array | None = None
        middle: jax.Array | None = None
        if double:
            largest = _by_groups(jnp.max, scale, DOUBLE_BLOCK, axis=-1)
            smallest = largest - _by_groups(jnp.max, _wide(largest, scale) - scale, DOUBLE_BLOCK, axis=-1)
            middle, step = (largest + smallest) * 0.5, _no_zeros((largest - smallest) * (0.5 / 127))
            scale = jnp.round((scale - _wide(middle, scale)) / _wide(step, scale) * TIES_TO_ZERO).astype(jnp.int8)
        result = cls(jnp.zeros(0, jnp.uint8), scale, step, middle, axes=_axes(linear.kernel), bias=linear.bias)
        relative = kernel / _no_zeros(_per_row(result._scales(), NF4_BLOCK, len(kernel)))
        codes = jnp.zeros(relative.shape, jnp.uint8)
        for low, high in itertools.pairwise(NF4_VALUES):
            codes = codes + (relative > (low + high) / 2)
        result.codes = Frozen(_pack(codes), axes=_axes(linear.kernel))
        return result

    def _scales(self) -> jax.Array:
        """float32 [blocks, *out]."""
        scale = self.scale[...]
        if self.step is None or self.middle is None:
            return scale
        return jnp.maximum(scale.astype(jnp.float32) * _wide(self.step[...], scale) + _wide(self.middle[...], scale), 0)

    def stored_rows(self, dtype) -> jax.Array:
        q = _unpack(self.codes[...])
        return (_nf4_value(q) * _per_row(self._scales(), NF4_BLOCK, len(q))).astype(dtype)


def dense(linear: QuantisedLinear, dtype) -> Linear:
    """A `Linear` with the dequantised weights. For one layer; `jax.vmap` it over stacked ones."""
    return linear_of(linear.dequantised(dtype), axes=_axes(linear.codes), bias=linear.bias)


def linear_of(kernel: jax.Array, *, axes: tuple[str | None, ...], bias: nnx.Param | None = None) -> Linear:
    """A `Linear` with this kernel [in, *out]."""
    result = Linear(1, 1, axes=axes, dtype=kernel.dtype, rngs=nnx.Rngs(0))
    result.kernel = nnx.Param(kernel, axes=axes)
    if bias is not None:
        result.bias = nnx.data(bias)
    return result


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return variable.get_metadata()["axes"]


def _no_zeros(scale: jax.Array) -> jax.Array:
    """Scales to divide by: where all weights are zero, any will do. Too small for the type counts as zero."""
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _round_to_float16(x: jax.Array) -> jax.Array:
    """float32 [...] not below zero, rounded to what float16 holds. Compilers may drop a conversion there and back."""
    exponent = jnp.frexp(x)[1]
    unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -13) - 11)
    return jnp.round(x / unit) * unit


def _by_groups(reduce: Callable, values: jax.Array, size: int, axis: int = 0) -> jax.Array:
    """Reduces runs of `size` along an axis; the last one may be shorter and counts as filled up with zeros."""
    axis %= values.ndim
    length = values.shape[axis]
    groups = -(-length // size)
    padding = [(0, groups * size - length if a == axis else 0) for a in range(values.ndim)]
    split = (*values.shape[:axis], groups, size, *values.shape[axis + 1 :])
    return reduce(jnp.pad(values, padding).reshape(split), axis=axis + 1)


def _wide(blocks: jax.Array, scale: jax.Array) -> jax.Array:
    """What blocks of NF4's scales share, for each of the scales."""
    return _per_row(blocks, DOUBLE_BLOCK, scale.shape[-1], axis=-1)


def _per_row(groups: jax.Array, size: int, length: int, axis: int = 0) -> jax.Array:
    """Each group's value `size` times, cut to `length`: the inverse of `_by_groups` for constant groups."""
    return jax.lax.slice_in_dim(jnp.repeat(groups, size, axis=axis), 0, length, axis=axis)


def _pack(q: jax.Array) -> jax.Array:
    """uint8 [in, *out] of values 0..15 -> uint8 [in / 2, *out]."""
    return q[0::2] | (q[1::2] << 4)


def _unpack(codes: jax.Array) -> jax.Array:
    """The inverse of `_pack`. Shifts, so that it fuses with what follows."""
    shifts = jnp.array([0, 4], jnp.uint8).reshape(2, *[1] * (codes.ndim - 1))
    return ((codes[:, None] >> shifts) & 15).reshape(2 * len(codes), *codes.shape[1:])


def _nf4_value(q: jax.Array) -> jax.Array:
    """NF4_VALUES[q], float32. A look-up: a tree of comparisons is not fused on CPUs, and each level is kept."""
    return jnp.array(NF4_VALUES, jnp.float32).at[q].get(mode="promise_in_bounds")
