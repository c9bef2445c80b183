"""What an engine will need of its device's memory, before anything is allocated: what fits and what does not."""

import dataclasses
import math
import os
from typing import NamedTuple

import jax

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import EngineOptions
from qwenvl_jax.inference.reading import EXTENSIONS, MOST_TOKENS
from qwenvl_jax.inference.steps import CHUNK
from qwenvl_jax.nn.continued_attention import BLOCK

GIB = 2**30
SCALE = 4  # bytes, of a token and head in 8 bits
USABLE = 0.95  # of a device: driver, programs and gaps take some


class MemoryPlan(NamedTuple):
    """Bytes on one device."""

    weights: int
    cache: int  # keys and values of the largest batch, and of one array more while it is moved
    sampling: int  # logits, counts, masks
    prefixes: int  # keys and values of prompts read before
    pictures: int  # features
    work: int  # reading the longest prompt: its keys and values, and attention scores of one layer
    available: int  # of the device

    @property
    def needed(self) -> int:
        return sum(self[:-1])

    @property
    def fits(self) -> bool:
        return self.needed <= USABLE * self.available


def plan_memory(generator: Generator, options: EngineOptions, available: int | None = None) -> MemoryPlan:
    """Of an engine with these options. available: bytes of the device, by default what it says that it has."""
    config, dtype_size = generator.config, generator.features(1).dtype.itemsize
    rows, heads = _shares(generator, options.slots)
    parts = 2 * config.num_hidden_layers * config.num_attention_heads // heads
    computed = parts * config.kv_channels * dtype_size  # keys and values of a token
    stored = parts * (config.kv_channels + SCALE) if options.cache == "int8" else computed
    array = stored // (2 * config.num_hidden_layers) * options.slots * options.max_length
    queries, width = config.visual.n_queries, config.hidden_size
    longest = options.max_length + EXTENSIONS[-1]
    scores = 4 * config.num_attention_heads // heads * MOST_TOKENS * BLOCK
    return MemoryPlan(
        weights=sum(held(leaf) for leaf in generator.leaves),
        cache=(options.slots * (stored * options.max_length + computed * CHUNK) + array) // rows,
        sampling=options.slots * config.vocab_size * (4 + 4 + 3) // rows,
        prefixes=stored * options.prefixes,
        pictures=options.pictures * queries * width * dtype_size,
        work=2 * computed * longest + 3 * scores,
        available=memory_of(jax.local_devices()[0]) if available is None else available,
    )


def held(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that each device has."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _shares(generator: Generator, slots: int) -> tuple[int, int]:
    """Into how many parts the rows of the largest batch are divided, and its heads."""
    heads = generator.config.num_attention_heads
    place = generator.layout.tokens
    rows, columns = (held(place(jax.ShapeDtypeStruct(shape, bool))) for shape in ((slots, 1), (1, heads)))
    return slots // rows, heads // columns


def check_memory(generator: Generator, options: EngineOptions, available: int | None = None) -> MemoryPlan:
    """The plan. Raises UserError for one that does not fit, with the options that would."""
    plan = plan_memory(generator, options, available)
    if plan.fits:
        return plan
    parts = ", ".join(f"{name} {getattr(plan, name) / GIB:.1f}" for name in plan._fields[:-1])
    problem = (
        f"{plan.needed / GIB:.1f} GiB are needed ({parts}) of {USABLE * plan.available / GIB:.1f} that can be used"
    )
    smaller = [(slots, options.prefixes) for slots in _halves(options.slots)]
    smaller += [(slots, 0) for slots in _halves(options.slots)]
    for slots, prefixes in smaller:
        less = dataclasses.replace(options, slots=slots, prefixes=prefixes)
        if plan_memory(generator, less, available).fits:
            advice = f"slots {slots}" + (" and prefixes 0" if prefixes != options.prefixes else "")
            raise UserError(f"{problem}; {advice} would fit")
    bits = "weights in fewer bits (quantize)" + (", a cache in int8" if options.cache == "model" else "")
    raise UserError(f"{problem}; use a shorter max_length, {bits}, or more devices")


def described(plan: MemoryPlan, options: EngineOptions) -> str:
    """The plan in a line, for whoever starts the engine."""
    parts = ", ".join(f"{name} {getattr(plan, name) / GIB:.2f}" for name in plan._fields[:-1])
    return (
        f"memory: {plan.needed / GIB:.2f} of {plan.available / GIB:.1f} GiB ({parts}) "
        f"for {options.slots} replies of {options.max_length} tokens at once"
    )


def memory_of(device: jax.Device) -> int:
    """Bytes that a device has for this process; of a CPU what the machine has."""
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(number.bit_length()) if number >> shift]
