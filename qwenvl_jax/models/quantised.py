"""A Qwen-VL whose language model has quantised linear maps, and the way back.

The maps of the decoder layers are nearly all weights of the model. Embeddings, norms, the vision tower and the output
layer stay as they are: they are few, and the answers suffer most from errors there.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qwenvl_jax.config import UserError
from qwenvl_jax.models.qwen_vl import Block, QwenVL
from qwenvl_jax.nn.linear import Linear
from qwenvl_jax.nn.quantised import Int4Linear, Int8Linear, NF4Linear, QuantisedLinear, dense

LINEARS = ("qkv", "out", "up", "gate", "down")  # of a Block
Form = Literal["int8", "int4", "nf4"]
FORMS: tuple[str, ...] = get_args(Form)
KINDS = {"int8": Int8Linear, "int4": Int4Linear, "nf4": NF4Linear}


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How weights are quantised: int8 per output, int4 by groups as GPTQ stores it, or nf4 by blocks of 64 (QLoRA).

    group_size: of int4, the rows that share a scale; -1 for one group. ordered: of int4, whether the rows have an
    order of their own. Raises UserError for what there is not.
    """

    form: str
    group_size: int = 128
    ordered: bool = False

    def __post_init__(self):
        if self.form not in FORMS:
            raise UserError(f"quantize {self.form!r} is not one of {', '.join(FORMS)}")
        if self.group_size < 2 and self.group_size != -1:
            raise UserError(f"group_size {self.group_size} should be a number of rows, 128 for example, or -1 for all")

    def __call__(self, linear: Linear) -> QuantisedLinear:
        """The map with quantised weights. For one layer; `jax.vmap` it over stacked ones."""
        if self.form == "int4":
            return Int4Linear.quantise(linear, self.group_size, ordered=self.ordered)
        return Int8Linear.quantise(linear) if self.form == "int8" else NF4Linear.quantise(linear)


def quantise(model: QwenVL, quantisation: Quantisation) -> QwenVL:
    """The model with quantised maps in the language model, layers stacked or in a list; the other arrays are shared.

    For a model that is in memory. Loading with `quantize` never holds all of it unquantised.
    """
    for _, linear in quantised_linears(model):
        raise UserError(f"the model is quantised already ({form_of(linear)})")
    return _replaced(model, Linear, quantisation)


def dequantise(model: QwenVL, dtype=jnp.float32) -> QwenVL:
    """The model with float maps again, of the values that the quantised ones stood for."""
    return _replaced(model, QuantisedLinear, partial(dense, dtype=dtype))


def _replaced(model: QwenVL, kind: type, change) -> QwenVL:
    model = nnx.merge(*nnx.split(model))  # a copy of the structure; the arrays are shared
    is_stack = isinstance(model.layers, Block)
    blocks: Iterable[Block] = [model.layers] if isinstance(model.layers, Block) else model.layers
    for block in blocks:
        for name in LINEARS:
            if isinstance(getattr(block, name), kind):
                setattr(block, name, (jax.vmap(change) if is_stack else change)(getattr(block, name)))
    return model


def quantised_linears(model: nnx.Module) -> list[tuple[str, QuantisedLinear]]:
    """The quantised maps of a model by dotted path; layers in a list have each their own."""
    return [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantisedLinear)
    ]


def form_of(linear: QuantisedLinear) -> str:
    """The name of a quantised map's form."""
    return next(name for name, kind in KINDS.items() if isinstance(linear, kind))
